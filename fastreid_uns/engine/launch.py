"""From a command line to a run: arguments, processes, errors and exit codes; light until something starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from fastreid_uns.errors import FailedElsewhere, InvalidState, UserError

T = TypeVar("T")

_LOST = 3
_INTERRUPTED = 130
_SMALLER = (
    "Lower the batch size (DATALOADER.SAMPLER.BATCH_SIZE, TEST.BATCH_SIZE) or the size of the images (INPUT.SIZE), or "
    "take a smaller network; SOLVER.ACCUMULATE computes a batch in parts."
)


class _Parser(argparse.ArgumentParser):
    """Takes KEY VALUE pairs before, between and after the flags."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def default_argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The arguments of a training command: `config_file`, `resume`, `eval_only`, `num_gpus`, `opts`.

    Args:
        description: what the command does, for `--help`.
    """
    parser = _Parser(
        description=description,
        epilog="KEY VALUE pairs change any key of the config, for example: SOLVER.EPOCHS 30 MODEL.LOSSES.triplet null",
    )
    parser.add_argument("--config-file", required=True, help="YAML file, for example configs/quickstart.yaml")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or the newest checkpoint")
    parser.add_argument(
        "--num-gpus", type=_count, default=1, metavar="N", help="processes on this machine, one per GPU"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes; 1, 2, ... is accepted")
    return int(text)


def default_setup(cfg: Any, args: Any) -> None:
    """What a command does before it builds a trainer: join the other processes, open the log, refuse early.

    Args:
        cfg: a complete config.
        args: of `default_argument_parser`; `resume` and `eval_only` are read where they are.

    Raises:
        ValueError, RuntimeError: the folder holds a run and neither flag is set; it cannot be written; no such device.
    """
    from fastreid_uns.engine.log import setup_logging
    from fastreid_uns.engine.run_folder import RunFolder
    from fastreid_uns.utils import comm

    comm.init_from_environment(cfg.MODEL.DEVICE, cfg.DISTRIBUTED.TIMEOUT_MINUTES)
    folder = RunFolder(cfg.OUTPUT_DIR)
    if getattr(args, "eval_only", False):
        comm.on_first_rank(folder.make)
        setup_logging(folder.path)
    elif not getattr(args, "resume", False):
        comm.on_first_rank(folder.refuse_a_run)


def launch(main: Callable[..., T], num_gpus: int = 1, args: Sequence[Any] = ()) -> T | None:
    """Run `main(*args)` as a command, in `num_gpus` processes on this machine.

    Several processes are the same command line run again under torchrun, which may also be typed by hand, as for
    several machines.

    Returns:
        What `main` gives, None if it ran in other processes.

    Raises:
        SystemExit: see `run_command`; with several processes, the code of the one that failed first.
    """
    if num_gpus > 1 and "RANK" not in os.environ:
        try:
            _run_again(num_gpus)
        except UserError as error:
            _fail(error, str(error))
        except KeyboardInterrupt:  # before there was any other process; later torchrun passes it on
            raise SystemExit(_INTERRUPTED) from None
        return None
    return run_command(main, *args)


def run_command(main: Callable[..., T], *args: Any, last_line: Callable[[], str | None] | None = None) -> T:
    """`main(*args)` with the manners of a command.

    A `UserError` is one line on stderr, its traceback is in the log; so is memory that is not enough. Ctrl-C and
    SIGTERM end within five seconds, also inside a library, with one line that says what is saved. Every other
    exception keeps its traceback.

    Args:
        last_line: gives that line; by default it speaks of the newest checkpoint.

    Raises:
        SystemExit: 2 after these, 3 where another process of the run is gone, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from fastreid_uns.engine.signals import Ending, ending_at_signals

    ending = Ending(last_line or _how_to_go_on)
    with ending_at_signals(ending):
        try:
            result = main(*args)
            ending.end_if_told()  # some library has swallowed the interrupt
            return result
        except KeyboardInterrupt:
            ending.end()
        except Exception as error:
            ending.end_if_told()  # or has made another exception of it
            _fail_if_known(error)
            raise


def _fail_if_known(error: Exception) -> None:
    """One line and the exit code for what a user can mend."""
    if isinstance(error, UserError):
        _fail(error, str(error))
    reason = " ".join(str(error).split())[:200] or "no memory"
    if _is_out_of_memory(error):
        _fail(error, f"the memory is not enough ({reason}). {_SMALLER}")
    if _lost_a_process(error):
        _fail(error, f"the connection to another process of the run was lost ({reason}).", code=_LOST)


def _fail(error: Exception, message: str, code: int = 2) -> NoReturn:
    """One line, and the exit code."""
    import logging

    logging.getLogger(__name__).debug("error: %s", message, exc_info=error)
    if not isinstance(error, FailedElsewhere) and _is_first_to_say(message):
        sys.stderr.write(f"error: {_one_line(message)}\n")
    raise SystemExit(code) from None


def _is_first_to_say(message: str) -> bool:
    """Whether no other process of the run has said the same; all of them read the same config."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from fastreid_uns.utils.watch import store_of_run

    try:
        return store_of_run("said", patience=2.0).add(message, 1) == 1
    except RuntimeError:  # the process that holds it is gone
        return True


def _one_line(message: str) -> str:
    """The message without the traceback that torch puts around an error of a process that decodes images."""
    if message.startswith("Caught ") and "DataLoader worker process" in message.partition("\n")[0]:
        message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
    return message


def _how_to_go_on() -> str | None:
    """The last line of an interrupted command; one process speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        return None
    from fastreid_uns.engine.run_folder import RunFolder

    run = RunFolder.current
    return f"stopped: {run.how_to_go_on()}" if run else "stopped: nothing was begun; start the same command again."


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of a GPU or of the machine, could not be had."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _lost_a_process(error: Exception) -> bool:
    """Whether a collective operation failed because another process has ended."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return False
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _run_again(count: int) -> None:
    """This command line once for each process, and one line if one of them fails without a word."""
    import logging

    program = _this_program()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which says so in five lines
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # of torchrun, in this process: the others speak for themselves
    command = ["--standalone", f"--nproc-per-node={count}", *program, *sys.argv[1:]]
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as error:
        raise SystemExit(128 + int(error.sigval)) from None
    except ChildFailedError as error:
        raise SystemExit(
            _code_of({rank: failure.exitcode for rank, failure in error.failures.items()}, count)
        ) from None


def _code_of(codes: Mapping[int, int], count: int) -> int:
    """The exit code for those of the processes, and a line if the one that failed could not say why.

    Args:
        codes: exit code by rank, or minus the number of a signal; those that torchrun has ended are among them.
        count: of all processes.
    """
    import signal

    told = [code for code in codes.values() if 0 < code < 128 and code != _LOST]
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if told or not killed:
        return told[0] if told else max(codes.values())
    rank, number = next(iter(killed.items()))
    sys.stderr.write(
        f"error: process {rank} of {count} was killed ({signal.Signals(number).name}), the others were ended. Free "
        f"memory if the system killed it; what is saved is kept, --resume goes on from there.\n"
    )
    return 128 + number


def _this_program() -> list[str]:
    """What torchrun needs to start the running program: a file, or `-m` and a module."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return ["-m", main.__spec__.name.removesuffix(".__main__")]  # type: ignore[union-attr]
    if not hasattr(main, "__file__"):
        raise InvalidState("launch: several processes need a program that can be started again. Put it into a file.")
    return [os.path.abspath(str(main.__file__))]
