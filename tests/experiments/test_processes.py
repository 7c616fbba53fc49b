import os
import signal
import subprocess
import sys
import time

import pytest

from sqloss.common.errors import UserError
from sqloss.experiments.processes import in_processes

pytest.importorskip("joblib")

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def test_every_call_is_made_once():
    calls = [(2, 3), (3, 2), (5, 2)]
    assert sorted(in_processes(pow, calls, 1)) == [8, 9, 25]
    assert list(in_processes(pow, [], 4)) == []


@posix
def test_sigterm_is_ctrl_c_while_there_is_work():
    def work():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        list(in_processes(work, [()], 1))
    assert signal.getsignal(signal.SIGTERM) is before


BEATING = """
import os, sys, time
from pathlib import Path
from sqloss.experiments.processes import in_processes

def beat(folder):
    while True:
        (folder / str(os.getpid())).write_text(str(time.monotonic()))
        time.sleep(0.05)

try:
    list(in_processes(beat, [(Path(sys.argv[1]),)] * 2, 100))
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_for(condition):
    end = time.monotonic() + 300  # of a machine that is busy
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@posix
def test_no_process_outlives_the_one_that_started_it(tmp_path):
    main = subprocess.Popen([sys.executable, "-c", BEATING, str(tmp_path)])
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)  # no more than there are calls
        main.kill()
        main.wait(300)
        beats = {}

        def silent():
            before = dict(beats)
            time.sleep(0.5)
            beats.update((path, path.read_text()) for path in tmp_path.iterdir())
            return beats == before

        wait_for(silent)
    finally:
        main.kill()
        main.wait()


@posix
def test_a_process_that_is_killed_is_a_user_error():
    def work():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UserError, match=r"^--jobs: expected processes that nothing else ends, got"):
        list(in_processes(work, [(), ()], 2))
