"""The embedded Prefect server, so started that it never outlives the run it was started for.

Prefect starts it as a plain child: a Ctrl-C in the terminal then ends the server before the run has told it
how it ended (more than a minute of retries and tracebacks), and a run that is killed leaves it behind. Here
it is a session of its own, which the terminal's Ctrl-C does not reach, and it watches its standard input, a
pipe from the run: when the run is gone, for whatever reason, the pipe closes and the server ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


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
