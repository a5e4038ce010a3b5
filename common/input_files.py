"""Read text files, with errors that name the file, the line and what to do."""

from pathlib import Path

from common.errors import UserError


def read_text(path: str | Path, wanted: str) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file; a byte order mark at its start is dropped.
        wanted: what the file should be, for the error message: "a JSONL file".

    Returns:
        The text, with every line end as a single newline.

    Raises:
        UserError: as `read_bytes`, and where the file is not UTF-8, with the number of the line.
    """
    data = read_bytes(path, wanted)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{path}: is a binary file, not text; give {wanted}") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8; convert the file to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: str | Path, wanted: str) -> bytes:
    """Read the bytes of a file that should contain text.

    Raises:
        UserError: if the file cannot be read, or if its first bytes are those of a known binary
            format or of another encoding; the message names that format.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give {wanted}") from error
    except ValueError as error:
        raise UserError(f"{path!r}: is not a valid path ({error}); give {wanted}") from error
    for signature, description in _SIGNATURES.items():
        if data.startswith(signature):
            raise UserError(f"{path}: {description}")
    return data


_COMPRESSED = "is compressed with {}; decompress it"
_SIGNATURES = {  # the first bytes of files that are given by mistake instead of text
    b"\x1f\x8b": _COMPRESSED.format("gzip"),
    b"\xfd7zXZ\0": _COMPRESSED.format("xz"),
    b"BZh": _COMPRESSED.format("bzip2"),
    b"\x28\xb5\x2f\xfd": _COMPRESSED.format("Zstandard"),
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive; extract the file from it",
    b"PK\3\4": "is a ZIP archive or an office document (docx, xlsx); give the text inside it",
    b"PAR1": "is a Parquet file; convert it to JSONL",
    b"SQLite format 3\0": "is an SQLite database; export the table as JSONL",
    b"%PDF-": "is a PDF document; give its text",
    b"\xff\xfe": "is UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert the file to UTF-8",
}
