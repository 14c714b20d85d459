"""Check the token of the Hub's client before it is sent."""

from __future__ import annotations

import os

from occgen_hub.errors import OccGenError


class TokenError(OccGenError):
    """A token cannot be sent. The message names where it is stored, never its content."""


def check_sendable(token: object = None) -> bool:
    """Whether there is a token. Raises TokenError if it cannot be sent.

    token: given by a program, else HF_TOKEN or the token of `hf auth login`. HTTP headers allow
    only printable ASCII. For other characters, clients raise errors that print the whole token.
    """
    from huggingface_hub import constants, get_token

    place = "the given token"
    if not isinstance(token, str):
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        place = next((name for name in names if os.environ.get(name)), constants.HF_TOKEN_PATH)
        try:
            token = get_token()
        except ValueError:  # The file is not UTF-8.
            token = "\0"
    if token is None:
        return False
    if not all("!" <= letter <= "~" for letter in token):
        raise TokenError(
            f"{place}: holds a token with spaces or other invalid characters; save it again as "
            "plain text with hf auth login."
        )
    return True
