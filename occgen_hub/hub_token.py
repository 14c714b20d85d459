"""The token that the Hub's client would send, looked at before it is sent."""

from __future__ import annotations

import os

from occgen_hub.errors import OccGenError


class TokenError(OccGenError):
    """There is a token, and it cannot be sent. The message names its place, never its content."""


def check_sendable(token: object = None) -> bool:
    """Whether there is a token; raises TokenError where it cannot be sent as it is.

    token: one that a program gives, else HF_TOKEN or that of `hf auth login`. A header holds
    letters, digits and signs of ASCII alone; clients that meet anything else print all of it.
    """
    from huggingface_hub import constants, get_token

    place = "the token given"
    if not isinstance(token, str):
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        place = next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)
        try:
            token = get_token()
        except ValueError:  # Of a file that is no UTF-8.
            token = "\0"
    if token is None:
        return False
    if not all("!" <= letter <= "~" for letter in token):
        raise TokenError(
            f"{place}: holds a token with blanks or other characters that no token has; save it "
            "again, as plain text, with hf auth login."
        )
    return True
