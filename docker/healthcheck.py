"""Exit with 0 if the teacher in this container takes work: its `/readyz`, asked on the loopback address.

The image holds no curl. Only the standard library is imported, so that a check costs a tenth of a second. Where every
client must show a certificate (TEACHER_TLS_CLIENT_CA), HEALTHCHECK_CERT and HEALTHCHECK_KEY name the one to show here.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

TIMEOUT_S = 3.0


def main() -> int:
    """The exit code."""
    port = int(os.environ.get("TEACHER_HTTP_PORT", "15556"))
    try:
        connection = _connection(port)
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        sys.stdout.write(f"port {port} does not answer: {exc}\n")
        if "TEACHER_TLS_CLIENT_CA" in os.environ and "HEALTHCHECK_CERT" not in os.environ:
            sys.stdout.write("clients must show a certificate: name one in HEALTHCHECK_CERT and HEALTHCHECK_KEY\n")
        return 1
    sys.stdout.write(f"/readyz says {status}\n")
    return int(status != http.client.OK)


def _connection(port: int) -> http.client.HTTPConnection:
    if "TEACHER_TLS_CERT" not in os.environ:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    context = ssl.create_default_context()
    # its certificate is for the name that clients use; what answers here is in this container anyway
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if (certificate := os.environ.get("HEALTHCHECK_CERT")) is not None:
        context.load_cert_chain(certificate, os.environ.get("HEALTHCHECK_KEY"))
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)


if __name__ == "__main__":
    sys.exit(main())
