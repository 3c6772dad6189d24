"""Section `card` of a run file: what nobody but its owner can say of the trained model.

It changes nothing that is trained. An export's README.md holds it, and `farnear push` publishes no model whose licence
nobody has named. All else in that README follows from the run (`farnear.model.card`).
"""

import re
from typing import Any

from pydantic import field_validator

from farnear.sections import Section

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class CardConfig(Section):
    """What the model card says beside what the run knows."""

    license: str | None = None
    """Licence of the trained model, by its SPDX or hub name such as apache-2.0; unset: unknown, and no push."""
    base_license: str | None = None
    """Licence of the base model; unset: what the base's own card says."""
    data_license: str | None = None
    """Licence of the training pages and queries; unset: unknown."""
    language: tuple[str, ...] = ()
    """Languages of pages and queries, by two or three letters: en, or [en, de]."""
    datasets: tuple[str, ...] = ()
    """Data sets on the hub that the pairs come from, NAME/REPO; those of hf:// shards need not be named."""
    model_name: str | None = None
    """Title of the card; unset: the base's name, and that it was fine-tuned."""
    model_id: str | None = None
    """Where the model will be on the hub, NAME/REPO, for the code in the card; `farnear push` sets it too."""

    @field_validator("language", "datasets", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        # YAML 1.1 reads Norwegian as a truth value.
        return tuple("no" if one is False else one for one in values)

    @field_validator("license", "base_license", "data_license")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not _LICENSE.fullmatch(value):
            raise ValueError(f"a licence by its SPDX or hub name, such as apache-2.0 or cc-by-4.0, not {value!r}")
        return value

    @field_validator("language")
    @classmethod
    def _are_codes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for language in value:
            if not _LANGUAGE.fullmatch(language):
                raise ValueError(f"languages are two or three letters, such as en, or multilingual, not {language!r}")
        return value

    @field_validator("datasets", "model_id")
    @classmethod
    def _is_on_a_hub(cls, value: Any) -> Any:
        for name in (value,) if isinstance(value, str) else value or ():
            if not HUB_NAME.fullmatch(name):
                raise ValueError(f"NAME/REPO, as on the hub, not {name!r}")
        return value

    @field_validator("model_name")
    @classmethod
    def _is_one_line(cls, value: str | None) -> str | None:
        if value is not None and not (value.strip() and value.isprintable()):
            raise ValueError(f"a single line, not {value!r}")
        return value
