"""Writes down what the bindings of one TensorRT version offer, without TensorRT: the names that our code may use.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106 && unzip tensorrt_cu13_bindings-*.whl -d unpacked
    python -m tests.helpers.record_tensorrt_names unpacked tests/unit/export/tensorrt_names.json

The bindings are compiled against libraries that only NVIDIA serves. Their classes can be looked at without them: empty
libraries with the names that the bindings ask for let Python import them. Nothing of TensorRT can be called that way.
Needs a C compiler and `nm` and `readelf`; run by hand when a new version comes out.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.tensorrt_stand_in import public_names

#: For every name: null if it is not there, otherwise the parameters of each overload ([] for what is no function).
_LIST = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
found = {"": trt.__version__}
for entry in json.load(sys.stdin):
    value = trt
    for part in entry.split("."):
        value = getattr(value, part, None)
    text = getattr(value, "__doc__", None) or ""
    overloads = re.findall(rf"^(?:\\d+\\. )?{part}\\((self: .*?)\\) -> ", text, re.MULTILINE)
    found[entry] = None if value is None else [re.findall(r", (\\w+): ", each) for each in overloads]
print(json.dumps(found))
"""


def main() -> None:
    unpacked, record = Path(sys.argv[1]), Path(sys.argv[2])
    library = next(unpacked.glob("tensorrt_bindings/tensorrt.so"))
    stubs = unpacked / "stubs"
    stubs.mkdir(exist_ok=True)
    undefined = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = re.findall(r"U ((?:create|get|init)\w*(?:INTERNAL|Registry|Version|Plugins)\w*)", undefined.stdout)
    source = stubs / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    for name in re.findall(r"\[(libnv\w+\.so\.\d+)\]", needed):
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", stubs / name, source], check=True)
    listed = subprocess.run(
        [sys.executable, "-c", _LIST, unpacked],
        input=json.dumps(public_names()),
        env={**os.environ, "LD_LIBRARY_PATH": str(stubs)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(listed.stdout)
    known = json.loads(record.read_text()) if record.is_file() else {}
    known[found.pop("")] = found
    record.write_text(json.dumps(known, sort_keys=True).replace("], ", "],\n").replace("}, ", "},\n") + "\n")


if __name__ == "__main__":
    main()
