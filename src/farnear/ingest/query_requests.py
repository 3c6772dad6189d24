"""Asks a vision model for queries: pages of corpus shards become request files, one JSON object a line.

The lines are those of OpenAI's batch API, which vLLM, SGLang and others read as well: a file can be uploaded there, or
sent line by line to any server with `farnear.ingest.query_sending`. A request carries its page as a data: URL, so files
are large; they are cut before they reach a size, which upload limits ask for.

The name of a request, its `custom_id`, is the page's: `SHARD.tar/KEY`. An answer finds its page by it.

Source of the format: https://platform.openai.com/docs/api-reference/batch/request-input
"""

import base64
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from farnear.errors import UserError
from farnear.ingest.images import IMAGE_FORMATS, fault_of
from farnear.ingest.pages import StoredPage, list_pages
from farnear.ingest.pool import map_in_threads

DEFAULT_PROMPT = Path(__file__).with_name("query_prompt.txt")
PLACE_OF_NUMBER = "{n}"
CHAT_URL = "/v1/chat/completions"
JPEG_QUALITY = 90
RESPONSE_FORMATS: Mapping[str, dict[str, Any] | None] = {
    "none": None,
    "json_object": {"type": "json_object"},
    "json_schema": {
        "type": "json_schema",
        "json_schema": {
            "name": "queries",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"queries": {"type": "array", "items": {"type": "string"}}},
                "required": ["queries"],
                "additionalProperties": False,
            },
        },
    },
}


def export_requests(
    shards: Sequence[Path],
    out: Path,
    *,
    model: str,
    prompt: Path = DEFAULT_PROMPT,
    queries_per_page: int = 3,
    max_side: int | None = None,
    max_bytes: int = 100_000_000,
    response_format: str = "none",
    extra_body: str | None = None,
) -> tuple[list[Path], int]:
    """Write a request for each page.

    Args:
        shards: corpus shards.
        out: `requests.jsonl` for the files `requests-00000.jsonl` and so on.
        model: what the server calls its model.
        prompt: a text file; each `{n}` in it becomes the number of queries.
        max_side: longer pages are sent as JPEGs of that many pixels on their longer side; None sends all as they are.
        max_bytes: of a file.
        response_format: a key of `RESPONSE_FORMATS`.
        extra_body: a JSON object of further parameters, such as {"temperature": 0.7}.

    Returns:
        The files, and how many requests they hold.

    Raises:
        UserError: a page cannot be read or is too large, the prompt has no `{n}`, or there are such files already.
    """
    text = _prompt(prompt, queries_per_page)
    options = _parameters(extra_body)
    if (wanted := RESPONSE_FORMATS[response_format]) is not None:
        options["response_format"] = wanted
    existing = sorted(out.parent.glob(f"{out.stem}-*{out.suffix}"))
    if existing:
        raise UserError(
            f"{existing[0]} and {len(existing) - 1} more are there already, and old and new requests would mix; name "
            "another file with --out or delete them"
        )
    pages = list_pages(shards)
    make = partial(_line, prompt=text, model=model, options=options, max_side=max_side, max_bytes=max_bytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as staging:
        drafts = _written(map_in_threads(make, pages), Path(staging), out, max_bytes)
        for draft in drafts:
            os.replace(draft, out.with_name(draft.name))
    return [out.with_name(draft.name) for draft in drafts], len(pages)


def _written(lines: Iterator[bytes], folder: Path, out: Path, max_bytes: int) -> list[Path]:
    paths: list[Path] = []
    size = 0
    for line in lines:
        if not paths or size + len(line) > max_bytes:
            paths.append(folder / f"{out.stem}-{len(paths):05d}{out.suffix}")
            size = 0
        with paths[-1].open("ab") as stream:
            stream.write(line)
        size += len(line)
    return paths


def _line(
    page: StoredPage, prompt: str, model: str, options: Mapping[str, Any], max_side: int | None, max_bytes: int
) -> bytes:
    image, kind = _image(page, max_side)
    address = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": address}}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], **options}
    request = {"custom_id": page.name, "method": "POST", "url": CHAT_URL, "body": body}
    line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
    if len(line) > max_bytes:
        raise UserError(
            f"the request for {page.name} has {len(line)} bytes, more than the {max_bytes} of a whole file; send pages "
            "smaller with --max-side, or raise --max-bytes"
        )
    return line


def _image(page: StoredPage, max_side: int | None) -> tuple[bytes, str]:
    """The bytes to send and their media type's second half."""
    data = page.read()
    if fault := fault_of(data):
        raise UserError(f"the page {page.name} is a file {fault}, so no model can see it; write its shard again")
    kind = "jpeg" if page.extension == "jpg" else page.extension
    if max_side is None:
        return data, kind
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
        if max(picture.size) <= max_side:
            return data, kind
        picture.draft("RGB", (max_side, max_side))
        small = picture.convert("RGB")
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue(), "jpeg"


def _prompt(path: Path, queries_per_page: int) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt {path} cannot be read as a text in UTF-8 ({error}); check the file") from error
    if PLACE_OF_NUMBER not in text:
        raise UserError(
            f"the prompt {path} does not say {PLACE_OF_NUMBER}, so a model would not know how many queries to write; "
            "put it where the number belongs"
        )
    return text.replace(PLACE_OF_NUMBER, str(queries_per_page))


def _parameters(extra_body: str | None) -> dict[str, Any]:
    if extra_body is None:
        return {}
    try:
        parameters = json.loads(extra_body)
    except ValueError as error:
        raise UserError(f"--extra-body is no JSON ({error}); write it like '{{\"temperature\": 0.7}}'") from error
    if not isinstance(parameters, dict) or {"model", "messages"} & set(parameters):
        raise UserError("--extra-body must be a JSON object without model and messages, which are given otherwise")
    return parameters
