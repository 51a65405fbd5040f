"""A document a line, under the key `text`."""

import json

from mars_lab.errors import InputError


def text_of(line: bytes, where: str) -> str:
    """The text of the document in `line`, which stands at `where`.

    Raises:
        InputError: the line is not an object with a string under `text`, in UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; convert the file to UTF-8 first") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where}: needs an object with a string "text", got {line[:60]!r}')
    try:
        row["text"].encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text has half of a surrogate pair ({error})") from None
    return row["text"]
