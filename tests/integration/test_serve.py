"""The running service: bad clients, ten thousand garbage requests, a signal; and its page in a real browser.

AROFACE_SCREENSHOTS=FOLDER keeps pictures of the page there.
"""

import base64
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import httpx2 as httpx
import numpy as np
import pytest

from launch.cli import main
from shards.synthetic import write_synthetic
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.needs import missing

KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory, drawn_faces):
    """An exported model, and a gallery of the first image of each drawn identity, calibrated on other people."""
    folder = tmp_path_factory.mktemp("service")
    write_checkpoint(folder / "run")
    model, gallery = str(folder / "model.onnx"), str(folder / "gallery")
    assert main(["export", str(folder / "run"), "--to", "onnx", "--out", model]) == 0
    write_synthetic(folder / "people", identities=10, images_per_identity=4, seed=9)
    for number, person in enumerate(sorted((folder / "people").iterdir())):
        person.rename(person.with_name(f"stranger-{number}"))
    for name, faces, take in (("gallery", drawn_faces, "first"), ("strangers", folder / "people", "all")):
        out = str(folder / f"{name}.npz")
        assert main(["embed", model, str(faces), "--take", take, "--out", out]) == 0
    assert main(["gallery", "build", gallery, "--embeddings", str(folder / "gallery.npz")]) == 0
    strangers = str(folder / "strangers.npz")
    assert main(["gallery", "calibrate", gallery, "--probes", strangers, "--fpir", "0.1,0.5"]) == 0
    return folder


@contextmanager
def running(folder, *options):
    """A service of its own gallery copy; yields process and address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "launch", "serve", "--model", str(folder / "model.onnx"), "--port", str(port)]
    command += ["--gallery", str(folder / "gallery"), "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_up(process, address)
            yield process, address
        finally:
            process.kill()


def wait_until_up(process, address):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the service did not come up")


@pytest.fixture
def own_copy(enrolled, tmp_path):
    shutil.copytree(enrolled, tmp_path / "copy")
    return tmp_path / "copy"


def post(address, path, image, **fields):
    files = {"image": ("face.jpg", image.read_bytes(), "image/jpeg")}
    return httpx.post(f"{address}{path}", files=files, data=fields, timeout=60)


def held(process):
    """Open files and threads."""
    return tuple(len(list(Path(f"/proc/{process.pid}/{name}").iterdir())) for name in ("fd", "task"))


def resident_mib(process):
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_search_finds_an_enrolled_image_and_a_signal_ends_it_well(own_copy, drawn_faces):
    face = sorted(next(iter(sorted(drawn_faces.iterdir()))).iterdir())[0]
    with running(own_copy) as (process, address):
        best = post(address, "/v1/search", face, top="1").json()["matches"][0]
        assert best["subject_id"] == face.parent.name
        assert best["score"] == pytest.approx(1, abs=1e-5)
        assert post(address, "/v1/entries", face, subject_id="new one", entry_id="n/1").status_code == 201
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    with running(own_copy) as (_, address):  # what was acknowledged is there
        assert httpx.delete(f"{address}/v1/entries", params={"entry_id": "n/1"}).json() == {"entries": 1}


def garbage(port, rng):
    """One connection with something wrong on it; returns the first line of the answer."""
    kinds = [
        rng.randbytes(rng.randrange(1, 400)) + b"\r\n\r\n",
        b"GET /" + rng.randbytes(20).hex().encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nConnection: close\r\n\r\nxxxxx",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 9\r\nConnection: close\r\n\r\n--b\r\nzzzz",
        b"POST /v1/entries HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
        b"DELETE /v1/entries?entry_id=%00%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /v1/gallery HTTP/1.1\r\nHost: elsewhere\r\nConnection: close\r\n\r\n",
    ]
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.settimeout(30)
        try:
            connection.sendall(rng.choice(kinds))
            return connection.recv(64)
        except ConnectionError:
            return b""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ten_thousand_garbage_requests_neither_crash_nor_leak(own_copy, drawn_faces):
    face = next(drawn_faces.rglob("*.jpg"))
    with running(own_copy) as (process, address):
        port = int(address.rpartition(":")[2])

        def batch(seed):
            rng = random.Random(seed)
            return [garbage(port, rng) for _ in range(100)]

        with ThreadPoolExecutor(4) as pool:
            first = [answer for answers in pool.map(batch, range(20)) for answer in answers]
            after_2000, held_2000 = resident_mib(process), held(process)
            rest = [answer for answers in pool.map(batch, range(20, 100)) for answer in answers]
            open_files, threads = held(process)
        answers = first + rest
        assert len(answers) == 10_000
        assert not any(answer.startswith(b"HTTP/1.1 5") for answer in answers)
        assert not any(answer.startswith(b"HTTP/1.1 2") for answer in answers)
        assert sum(answer.startswith(b"HTTP/1.1 4") for answer in answers) > 9000
        assert resident_mib(process) < after_2000 + 30  # 8,000 requests later
        assert open_files <= held_2000[0] + 8  # connections on their way
        assert threads <= held_2000[1] + 2
        assert post(address, "/v1/search", face).status_code == 200


@pytest.mark.slow
def test_slow_clients_are_let_go_and_do_not_hold_up_others(own_copy, drawn_faces):
    face = next(drawn_faces.rglob("*.jpg"))
    with running(own_copy) as (_, address):
        port = int(address.rpartition(":")[2])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for connection in slow[:25]:
            connection.sendall(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        for connection in slow[25:]:
            connection.sendall(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
        assert post(address, "/v1/search", face).status_code == 200
        for connection in slow:
            connection.settimeout(40)
        assert all(connection.recv(100) == b"" for connection in slow[:25])
        assert all(connection.recv(100).startswith(b"HTTP/1.1 408") for connection in slow[25:])
        for connection in slow:
            connection.close()


def test_an_address_for_others_needs_a_key_and_a_port_in_use_is_named(enrolled, capsys):
    command = ["serve", "--model", str(enrolled / "model.onnx"), "--gallery", str(enrolled / "gallery")]
    assert main([*command, "--host", "0.0.0.0"]) == 2  # noqa: S104 - refused
    assert "--key-file" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*command, "--port", str(port)]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(enrolled, capsys):
    command = ["serve", "--model", str(enrolled / "model.onnx"), "--gallery", str(enrolled / "gallery")]
    assert main([*command, "--device", "cuda:99"]) == 2
    assert "device cuda:99: PyTorch sees" in capsys.readouterr().err


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium with a camera that shows a test picture."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1100,900"]
    flags += [
        "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream",
        f"user-data-dir={tmp_path / 'profile'}",
    ]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    found.implicitly_wait(0)
    yield found
    found.quit()


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(condition)


def text(browser, name):
    from selenium.webdriver.common.by import By

    return browser.find_element(By.ID, name).text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_page_searches_enrols_and_deletes(own_copy, drawn_faces, browser, tmp_path):
    from selenium.webdriver.common.by import By

    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    faces = sorted(next(iter(sorted(drawn_faces.iterdir()))).iterdir())
    with running(own_copy, "--key-file", str(key_file)) as (_, address):
        browser.get(address)
        wait(browser, lambda b: b.find_element(By.ID, "key-form").is_displayed())
        browser.find_element(By.ID, "key").send_keys(KEY + "\n")
        wait(browser, lambda b: "12 entries of 12 subjects" in text(b, "gallery"))
        assert "at 10 % false alarms" in text(browser, "thresholds")

        drop(browser, faces[0])  # is searched of itself
        wait(browser, lambda b: len(b.find_elements(By.CSS_SELECTOR, "#matches li")) == 5)
        first = browser.find_element(By.CSS_SELECTOR, "#matches li")
        assert first.find_element(By.CLASS_NAME, "subject").text == faces[0].parent.name
        assert first.find_element(By.CLASS_NAME, "score").text == "1.000"
        assert "where 10 % of strangers raise a false alarm" in first.find_element(By.CLASS_NAME, "meaning").text

        browser.find_element(By.ID, "subject").send_keys("somebody <b>new</b>")
        browser.find_element(By.ID, "enrol-button").click()
        wait(browser, lambda b: "13 entries of 13 subjects" in text(b, "gallery"))
        browser.find_element(By.ID, "search").click()
        wait(browser, lambda b: "somebody <b>new</b>" in text(b, "matches"))  # as text, not as markup
        screenshot(browser, "matches")

        new = next(
            line
            for line in browser.find_elements(By.CSS_SELECTOR, "#matches li")
            if line.find_element(By.CLASS_NAME, "subject").text == "somebody <b>new</b>"
        )
        new.find_element(By.TAG_NAME, "button").click()
        browser.switch_to.alert.accept()
        wait(browser, lambda b: "12 entries of 12 subjects" in text(b, "gallery"))

        browser.find_element(By.ID, "camera").click()
        wait(browser, lambda b: text(b, "camera") == "Take it" and b.find_element(By.ID, "guide").is_displayed())
        for button in ("search", "enrol-button"):  # the face chosen before is hidden now
            assert not browser.find_element(By.ID, button).is_enabled()
        screenshot(browser, "camera")
        browser.find_element(By.ID, "camera").click()
        wait(browser, lambda b: b.find_element(By.ID, "preview").is_displayed())
        browser.find_element(By.ID, "search").click()
        wait(browser, lambda b: text(b, "last").endswith("ms"))
        browser.find_element(By.ID, "subject").send_keys("from the camera")
        browser.find_element(By.ID, "enrol-button").click()
        wait(browser, lambda b: "13 entries of 13 subjects" in text(b, "gallery"))

        browser.find_element(By.ID, "file").send_keys(str(key_file))
        browser.find_element(By.ID, "search").click()
        wait(browser, lambda b: "neither JPEG nor PNG" in text(b, "message"))
        wait(browser, lambda b: text(b, "p99").endswith("ms") and float(text(b, "rate")) > 0)
        wait(browser, lambda b: text(b, "waiting") == "0")  # the page asks once in a while
        complaints = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        expected = ("401", "415")  # before the key, and the text file
        assert [line for line in complaints if not any(code in line for code in expected)] == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_page_explains_itself_to_a_newcomer(own_copy, drawn_faces, browser, tmp_path):
    """On a telephone, with the keyboard alone: a wrong key, an empty gallery, files that will not do, no service."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    key_file, wide = tmp_path / "key", tmp_path / "wide.png"
    key_file.write_text(KEY)
    cv2.imwrite(str(wide), np.zeros((40, 90, 3), np.uint8))
    face, other = sorted(drawn_faces.rglob("*.jpg"))[:2]
    for subject in sorted(drawn_faces.iterdir()):
        assert main(["gallery", "remove", str(own_copy / "gallery"), "--subject", subject.name]) == 0
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)

    def shown(name):
        return browser.find_element(By.ID, name).is_displayed()

    def type_in(text):
        ActionChains(browser).send_keys(text).perform()

    with running(own_copy, "--key-file", str(key_file)) as (process, address):
        browser.get(address)
        wait(browser, lambda b: shown("key-form"))
        assert not shown("main")
        assert text(browser, "key-message") == ""
        for wrong, why in (("wrong\n", "not the key"), ("schl\u00fcssel\n", "accents")):
            type_in(wrong)  # the field has the focus
            wait(browser, lambda b, why=why: why in text(b, "key-message"))
            browser.switch_to.active_element.send_keys(Keys.CONTROL + "a")
        screenshot(browser, "locked")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        type_in(KEY + "\n")
        wait(browser, lambda b: "Empty: choose a face and enrol it" in text(b, "gallery"))
        assert shown("main")
        assert text(browser, "message") == ""

        type_in(Keys.TAB)  # from the top of the page to the first thing to do
        assert browser.switch_to.active_element.get_attribute("id") == "file"
        browser.switch_to.active_element.send_keys(str(face))
        wait(browser, lambda b: shown("preview"))
        type_in(Keys.TAB * 2 + "\n")
        wait(browser, lambda b: "The gallery is empty" in text(b, "message"))
        type_in(Keys.TAB + "ann\n")
        wait(browser, lambda b: "1 entry of 1 subject " in text(b, "gallery"))
        ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).send_keys("\n").perform()
        wait(browser, lambda b: "ann" in text(b, "matches"))
        assert text(browser, "message") == ""  # what was said before holds no more
        assert browser.execute_script("return document.querySelector('#matches li').getBoundingClientRect().top") < 844

        browser.find_element(By.ID, "file").send_keys(str(other))
        wait(browser, lambda b: not text(b, "matches"))  # they are those of another face
        browser.find_element(By.ID, "file").send_keys(str(wide))
        browser.find_element(By.ID, "search").click()
        wait(browser, lambda b: "90 x 40 pixels" in text(b, "message"))
        browser.find_element(By.ID, "file").send_keys(str(key_file))
        wait(browser, lambda b: "no picture" in text(b, "hint") and not shown("preview"))
        screenshot(browser, "phone")
        process.kill()
        process.wait(30)
        browser.find_element(By.ID, "search").click()
        wait(browser, lambda b: "does not answer" in text(b, "message"))
        wait(browser, lambda b: text(b, "waiting") == "\u2013")


def drop(browser, path):
    """Let the page see a file dropped on it, as a file manager would."""
    content = base64.b64encode(path.read_bytes()).decode()
    browser.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "face.jpg", {type: "image/jpeg"}));
        const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.getElementById("drop").dispatchEvent(event);
        """,
        content,
    )


def screenshot(browser, name):
    """Kept in the folder that the environment variable AROFACE_SCREENSHOTS names, for a look at the page."""
    folder = os.environ.get("AROFACE_SCREENSHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
