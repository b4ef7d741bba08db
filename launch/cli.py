"""The `aroface` command: a table of subcommands, each imported only when it is chosen.

Exit code 0: done. 2: something the user can put right, told in one message. 1: a bug, with its traceback.
"""

import argparse
import errno
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from aroface import __version__
from aroface.files import NO_ROOM
from launch.command_parser import CommandParser

__all__ = ["COMMANDS", "main"]

#: name -> (module, one line of help). Each module has `add_arguments(parser)` and `run(args) -> int`.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "launch.cmd_quickstart",
        "pack, train, export, gallery, identify, report: the whole chain on one machine",
    ),
    "pack": ("launch.cmd_pack", "images in any layout -> WebDataset shards with manifest and index"),
    "synthesize": ("launch.cmd_synthesize", "draw synthetic identities to try things on"),
    "verify": ("launch.cmd_verify", "decode, hash and count every sample of a shard directory"),
    "train": ("launch.cmd_train", "train a model from one configuration file"),
    "study": ("launch.cmd_study", "compare alignment attacks by many small trainings"),
    "checkpoint": ("launch.cmd_checkpoint", "look at checkpoints, check them, thin them out"),
    "launch": ("launch.cmd_launch", "the same training over one or several nodes, checked before it starts"),
    "plan": ("launch.cmd_plan", "memory, communication and time of a configuration on N GPUs, on paper"),
    "attack": ("launch.cmd_attack", "show what the alignment attack does to training images"),
    "import": ("launch.cmd_import", "weights of arcface_torch, AdaFace, CVLface -> checkpoint, and back"),
    "export": ("launch.cmd_export", "checkpoint -> ONNX or TensorRT, behind gates"),
    "embed": ("launch.cmd_embed", "images -> embeddings (.npz), with a model of any kind"),
    "gallery": ("launch.cmd_gallery", "build, change, search, calibrate and inspect a gallery"),
    "serve": ("launch.cmd_serve", "a gallery over HTTP, with a page to try it on"),
    "evaluate": ("launch.cmd_evaluate", "identification and verification numbers, with intervals"),
    "report": ("launch.cmd_report", "results -> one page of tables and curves"),
    "bench": ("launch.cmd_bench", "what this machine reaches, against its limit and the usual way"),
    "doctor": ("launch.cmd_doctor", "what is installed here, what works, and how to mend the rest"),
}

_USER_ERROR = 2
#: What to do where memory runs out.
_SMALLER_BATCH = "Lower --batch where the command has it, or use a device with more memory."
_SMALLER = {
    "train": "Lower batch.micro_batch (batch.global_batch stays, more steps are accumulated), or set "
    "model.checkpoint_activations=true; `aroface plan CONFIG --gpus N` tells what fits."
}
#: Why the system refuses a path that the user has named -> what to do.
_REFUSED_PATHS = {
    **dict.fromkeys(NO_ROOM, "Make room, or name a path on another disk."),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Change its permissions, or name another path."),
    errno.ENOTDIR: "A file stands where a folder is meant; name another path.",
    errno.EISDIR: "A folder stands where a file is meant; name another path.",
    errno.EEXIST: "Something else stands there; name another path, or remove it first.",
}


def _build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="aroface",
        usage="aroface COMMAND [options]",
        description="Train, export and search face-recognition models that hold up on badly aligned faces.",
        epilog=f"commands:\n{table}\n\n`aroface COMMAND --help` tells more. Start with: aroface quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"aroface {__version__}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes, and not always Unicode
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser()
    if not arguments:
        parser.print_help()
        return 0
    chosen = parser.parse_args(arguments)
    if chosen.command not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(chosen.command, COMMANDS, n=1)
        hint = f"did you mean `aroface {near[0]}`?" if near else f"choose from {', '.join(COMMANDS)}."
        print(f"aroface: unknown command {chosen.command!r}; {hint}", file=sys.stderr)
        return _USER_ERROR
    return _run_command(chosen.command, chosen.rest)


def _run_command(name: str, arguments: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost up to 4x CPU beside a busy neighbour
    from aroface.errors import ArofaceError

    module_name, help_line = COMMANDS[name]
    module = importlib.import_module(module_name)
    add_arguments: Callable[[argparse.ArgumentParser], None] = module.add_arguments
    run: Callable[[argparse.Namespace], int] = module.run
    parser = CommandParser(prog=f"aroface {name}", description=module.__doc__ or help_line)
    add_arguments(parser)
    args = parser.parse(arguments)
    _configure_logging()
    try:
        return run(args)
    except ArofaceError as error:
        print(f"aroface {name}: {error}", file=sys.stderr)
        return _USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        size = f" ({wanted[1]} more were wanted)" if wanted else ""
        print(f"aroface {name}: out of memory{size}. {_SMALLER.get(name, _SMALLER_BATCH)}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print(f"aroface {name}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        is_nameless = error.filename is None
        if error.errno not in _REFUSED_PATHS or (is_nameless and error.errno not in NO_ROOM):
            raise
        where = "" if is_nameless else f"{error.filename}: "
        print(f"aroface {name}: {where}{error.strerror}. {_REFUSED_PATHS[error.errno]}", file=sys.stderr)
        return _USER_ERROR


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    torch = sys.modules.get("torch")  # not imported for this
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_device or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _configure_logging() -> None:
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every build that it tries


if __name__ == "__main__":
    sys.exit(main())
