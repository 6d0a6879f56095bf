"""Under which licence an artifact may be published: its base's, or the one that its publisher states.

An unknown licence is never filled in, and a known one is never replaced without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from bittern.errors import BitternError
from bittern.origin import LICENCE_KEYS
from bittern.writer import LICENCE_FILES

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_UNKNOWN = ("unknown", "none")
_STATE = "--license states it"


def settle(
    stated: str | None,
    card: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    base_id: str | None,
    files: Collection[str],
    whose: str = "the base",
) -> tuple[dict[str, Any], list[str]]:
    """The licence fields of a card, and what must be said about them.

    Args:
        stated: by ``--license``.
        card: metadata of the publisher's own card; empty without one.
        base: what the base's card says (see :func:`bittern.origin.stated_card`).
        base_id: the base on the Hub.
        files: names of the files that are published.
        whose: what to call the base in a message.

    Raises:
        BitternError: when no licence is known, when the card contradicts the base, and for a licence of the
            publisher's own that has no name or no link.
    """
    inherited = _fields(base or {})
    own = _fields(card)
    if stated is not None and not _IDENTIFIER.fullmatch(stated):
        raise BitternError(f"--license: expected an identifier of the Hub such as apache-2.0 or mit, found {stated!r}")
    notes: list[str] = []
    if stated is not None:
        alike = next((fields for fields in (own, inherited) if fields.get("license") == stated), {})
        chosen = {**alike, "license": stated}
        if inherited and inherited["license"] != stated:
            said = _shown(inherited["license"])
            notes.append(f"{whose} is licensed as {said}; this is published as {stated}, as --license says")
    elif own:
        if inherited and own["license"] != inherited["license"]:
            found, expected = _shown(own["license"]), _shown(inherited["license"])
            raise BitternError(f"card: license: expected {expected}, as of {whose}, found {found}; {_STATE}")
        chosen = {**inherited, **own}
    elif inherited:
        chosen = dict(inherited)
    else:
        raise BitternError(_unknown(base, whose, files))
    return _completed(chosen, base_id, files), notes


def files_among(names: Collection[str]) -> list[str]:
    """The files that a licence may ask to travel along, of those at the top of a repository."""
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in LICENCE_FILES))


def _fields(card: Mapping[str, Any]) -> dict[str, Any]:
    """The licence fields of a card; empty when it names none."""
    licence = card.get("license")
    licence = [licence] if isinstance(licence, str) else licence
    if not isinstance(licence, list):
        return {}
    known = [name for name in licence if isinstance(name, str) and name.strip() and name.lower() not in _UNKNOWN]
    if not known:
        return {}
    fields = {"license": known[0] if len(known) == 1 else known}
    return fields | {key: card[key] for key in LICENCE_KEYS[1:] if isinstance(card.get(key), str)}


def _completed(chosen: dict[str, Any], base_id: str | None, files: Collection[str]) -> dict[str, Any]:
    """The fields with a link that leads somewhere from the new repository too."""
    link, licence = chosen.get("license_link"), chosen["license"]
    texts = [name for name in files_among(files) if name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
    if link is not None and "://" not in link and link not in files:
        link = f"https://huggingface.co/{base_id}/blob/main/{link}" if base_id else None
    if licence == "other":
        if "license_name" not in chosen:
            raise BitternError("license: other needs license_name (and license_link) in the metadata of a card: --card")
        link = link or (texts[0] if texts else None)
        if link is None:
            raise BitternError(
                f"license: {chosen['license_name']} needs license_link in the metadata of a card (--card),"
                " or its text as LICENSE in the artifact"
            )
    fields = {"license": licence, "license_name": chosen.get("license_name"), "license_link": link}
    return {key: value for key, value in fields.items() if value is not None}


def _unknown(base: Mapping[str, Any] | None, whose: str, files: Collection[str]) -> str:
    """What was looked at in vain."""
    if base is None:
        seen = f"{whose} came without a model card"
    elif "unreadable" in base:
        seen = f"the card of {whose} cannot be read: {base['unreadable']}"
    else:
        seen = f"the card of {whose} names none"
    texts = files_among(files)
    more = f" (read {texts[0]})" if texts else ""
    return f"license: expected the base's, found none: {seen}; {_STATE}{more}"


def _shown(licence: str | list[str]) -> str:
    return licence if isinstance(licence, str) else ", ".join(licence)
