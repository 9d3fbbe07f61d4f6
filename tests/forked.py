"""Python programs as forks of a process that has imported what they import, so that tests don't wait for imports.

The real launcher and the real recipes run, with processes, signals and exit codes of their own; only `exec` of a new
interpreter is left out. Processes that ranks start are new interpreters. Tests of what a start says or imports, or with
environment variables that are read by imports, start real ones (`fork=False` of tiny.launch).
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn
from unittest import mock

_LAUNCHERS = ("deepspeed.launcher.runner", "deepspeed.launcher.launch")
_Popen = subprocess.Popen
_IMPORTED = [
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_presets",
    "distutils.spawn",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "pyarrow.compute",
    "pytrec_eval",
    "torch.utils.tensorboard",
    "transformers.hf_argparser",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "ds_embed.models.lora_linear",
    "ds_embed.tools.plan.job",
    "ds_embed.tools.evaluate",
    "ds_embed.vectors.generate",
]
_WHILE_IMPORTING = {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}


def run(command: list[str], environment: dict[str, str], folder: Path, timeout: float) -> subprocess.CompletedProcess:
    """`subprocess.run` of a command [sys.executable, script or -m module, flag, ...], with captured text."""
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, name) for name in ("stdout", "stderr")]
        process = Program(command, environment, folder, *outputs)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
    return subprocess.CompletedProcess(command, process.returncode, *texts)


class Program:
    """Such a process, in a session of its own, as subprocess.Popen has it; output is appended to the two files."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._process = context.Process(target=_begin, args=(command, environment, folder, stdout, stderr))
        with mock.patch.dict(os.environ, _WHILE_IMPORTING):  # the first one starts the process that imports
            self._process.start()
        self.args, self.pid = command, self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def _begin(command: list[str], environment: dict[str, str], folder: Path, *outputs: Path) -> NoReturn:
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(folder)
    _become(command, environment)


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Turn this process, a fork, into `command`."""
    words = [word for word in command[1:] if word != "-u"]
    os.environ.clear()
    os.environ.update(environment)
    os.execv = lambda _, command: _become(command, dict(os.environ))
    code = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            subprocess.Popen = _ForkedPopen if words[1] in _LAUNCHERS else _Popen
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, subprocess.Popen = words, _Popen
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is None or isinstance(code, str):
            print(end.code or "", file=sys.stderr, end="\n" if code else "")
            code = int(bool(code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:  # what an interpreter does when it ends
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _ForkedPopen(subprocess.Popen):
    """The launcher's way to start its next process."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        if args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
        self.pid = os.fork()
        self._child_created = True
        if not self.pid:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            _become(args, env)
