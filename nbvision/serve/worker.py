"""One of several processes behind a port: ``python -m nbvision.serve.worker``, started by its supervisor."""

from __future__ import annotations

import logging
import socket
import sys

from nbvision.errors import NbvisionError
from nbvision.serve.server import log_as_json, run_worker

logger = logging.getLogger("nbvision.serve")


def main() -> int:
    """Its arguments: the service's file, its number, the sockets of the port and of the supervisor, gRPC's place."""
    path, worker, listening, supervisor, *grpc = sys.argv[1:]
    log_as_json()
    try:
        return run_worker(
            path,
            socket.socket(fileno=int(listening)),
            worker=int(worker),
            grpc=(grpc[0], int(grpc[1])) if grpc else None,
            supervisor=socket.socket(fileno=int(supervisor)),
        )
    except NbvisionError as error:
        logger.error("not started", extra={"worker": int(worker), "error": str(error)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
