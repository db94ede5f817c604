"""Prefect servers of our own: the embedded one of a run, and one with a scheduler and the UI for `serve`.

They are so started that they never outlive the process they were started for. Prefect starts its embedded one as a
plain child: a Ctrl-C in the terminal then ends the server before the run has told it how it ended (a minute and more of
retries and tracebacks), and a run that is killed leaves it behind. Here a server is a session of its own, which the
terminal's Ctrl-C does not reach, and it watches its standard input, a pipe from the run: when the run is gone, for
whatever reason, the pipe closes and the server ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def use_guarded_server() -> None:
    """Have Prefect start its embedded server the guarded way, should it need one in this process."""
    from prefect.server.api.server import SubprocessASGIServer

    class GuardedServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[bytes]:
            from prefect.settings import get_current_settings

            # -P: this file's folder must not come before installed packages.
            return subprocess.Popen(
                [sys.executable, "-P", __file__, str(self.port)],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env={
                    **os.environ,
                    "PREFECT_UI_ENABLED": "0",
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                    **get_current_settings().to_environment_variables(exclude_unset=True),
                },
            )

    # Under None Prefect looks for the server of the process; its own test harness puts one there as well.
    if not isinstance(SubprocessASGIServer._instances.get(None), GuardedServer):
        SubprocessASGIServer._instances[None] = GuardedServer()


@contextmanager
def local_server(port: int, *, wait: float = 180.0) -> Iterator[str]:
    """Run a whole Prefect server (127.0.0.1, SQLite), scheduler and UI included; yield the address of its API.

    It ends with the block, and with this process if that is killed.

    Raises:
        OSError: The port is taken, or the server did not start within `wait` seconds.
    """
    from prefect.settings import get_current_settings

    address = f"http://127.0.0.1:{port}/api"
    with _free(port):
        pass
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(port)],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **settings, "PREFECT_API_URL": address, "PREFECT_UI_API_URL": address},
    )
    try:
        deadline = time.monotonic() + wait
        while not _answers(address):
            if server.poll() is not None:
                raise OSError(f"the Prefect server ended at its start (exit code {server.returncode})")
            if time.monotonic() > deadline:
                raise OSError(f"the Prefect server did not answer at {address} within {wait:.0f} s")
            time.sleep(0.2)
        yield address
    finally:
        assert server.stdin is not None
        with suppress(OSError):
            server.stdin.close()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def _free(port: int) -> Iterator[None]:
    import socket

    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} is taken ({error.strerror}); name another with --port") from None
        yield


def _answers(address: str) -> bool:
    try:
        # No proxy: the server is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _serve(port: int) -> None:
    import uvicorn

    threading.Thread(target=_end_with_the_run, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


def _end_with_the_run() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    # A server that does not mind the signal (it may not have got as far as handling it) is ended all the same.
    threading.Event().wait(5)
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
