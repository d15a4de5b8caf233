"""Whether the Hugging Face Hub can be reached, found out before its libraries try for minutes."""

from __future__ import annotations

import threading

from launch.topology import hub_is_off

HUB_SECONDS = 2.0
"""How long to try to reach the Hub before saying that it cannot be reached."""


def hub_trouble(path: str) -> str:
    """Why the Hub cannot be asked for anything; nothing where it answers a request for `path` within HUB_SECONDS.

    A connection alone says nothing: some networks take any, and are silent or answer in the place of all others. In a
    thread, because no time limit of a request counts the time that a name takes to be looked up.
    """
    if hub_is_off():
        return "the Hub is switched off (HF_HUB_OFFLINE)"
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask_hub(path)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    return found[0] if found else _silent()


def _silent() -> str:
    return f"the Hub did not answer within {HUB_SECONDS:g} s"


def _ask_hub(path: str) -> str:
    import ssl
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    from huggingface_hub import constants

    try:
        with urlopen(f"{constants.ENDPOINT}{path}", timeout=HUB_SECONDS):
            return ""
    except HTTPError as error:
        # Of what it has not the Hub says so in a header; whether it is there for this user, the libraries find out.
        is_hub = error.code < 500 and (error.code != 404 or "X-Error-Code" in error.headers)
        return "" if is_hub else f"what answers at {constants.ENDPOINT} is not the Hub (status {error.code})"
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return ""  # the libraries may have been told of other certificates
        return _silent() if isinstance(reason, TimeoutError) else f"the Hub cannot be reached ({reason})"
