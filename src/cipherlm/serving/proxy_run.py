"""The OpenAI-compatible endpoint as a process: whoever waits for a text hears that it ends."""

from pathlib import Path
from socket import socket

import uvicorn
from fastapi import FastAPI

STOP_SECONDS = 5
"""For clients to take the last words."""


class ProxyServer(uvicorn.Server):
    """Serves until a signal ends it (SIGTERM, SIGINT) or ``should_exit`` is set."""

    def __init__(self, app: FastAPI, *, certfile: Path | None = None, keyfile: Path | None = None) -> None:
        config = uvicorn.Config(
            app,
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Refuse what is new, end what streams with an error event, then close.

        uvicorn alone would let streams go on for ``STOP_SECONDS`` and then cut them off.
        """
        for server in self.servers:
            server.close()
        self._app.state.close()
        await super().shutdown(sockets)
