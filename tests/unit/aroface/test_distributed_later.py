"""One rank asking all: the answer is that of the call before."""

from aroface.distributed import AnyRankLater


def test_the_answer_comes_one_call_later():
    ask = AnyRankLater()
    asked = [(False, True), (True, False), (False, False)]
    assert [ask(conditions) for conditions in asked] == [(False, False), *asked[:2]]
