"""Names of parametrised cases that are the same in every process."""

import re


def stable_id(value: object) -> str:
    """The value in words, without addresses: processes that share the tests must agree."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))
