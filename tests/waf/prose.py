"""What people write: prose in ten languages that Debian ships, and remarks with emoji and SQL words."""

import re
from itertools import cycle, islice
from pathlib import Path

from tests.waf.debian import unpacked

PACKAGES = (
    *("fortunes", "fortunes-min", "fortunes-de", "fortunes-es", "fortunes-it", "fortunes-cs", "fortunes-pl"),
    *("fortunes-ru", "fortunes-br", "fortunes-bg", "fortunes-eo", "fortunes-ga"),
)
#: Collections that are code, shell and its jokes for a good part.
_CODE = re.compile(
    r"linux|computers|perl|debian|unix|bofh|hacker|linuxcookie|asciiart|definitions|knghtbrd|translate|magic|pratchett_|bash"
)
_SIGNS = re.compile(r"[{}<>`\\]|==|=>|\(\)|;\s*$|^\s*[#$%]\s", re.MULTILINE)

REMARKS = (
    "Please select one from the list and drop me a line, or update my order where it says 'pending' 🙏",
    "I'd like to join the union; we select our table by the window and order by the glass 🍷. It's \"fine\".",
    "Where can I insert the coin? The machine said: 'select and drop' — nothing happened! 😡😡",
    "1 or 2 of the nurses were kind; the rest... well -- don't ask. Rating: 4/5 ⭐⭐⭐⭐",
    "Bitte löschen Sie mein Konto (delete from your list!) und grüßen Sie „Herrn O'Neill“ 😊",
    "Je voudrais « select » plutôt que « drop » ; c'est l'union qui fait la force 💪 — n'est-ce pas ?",
    "¿Dónde está la tabla? ¡Quiero insertar 2 valores y actualizar el pedido! 🤔 'Gracias'",
    "Хочу выбрать (select) из списка; удалить (delete) нельзя? «Спасибо» 👍",
    "请选择表格并更新我的订单，谢谢！😀 “很好” 1=一 or 2=二",
    "テーブルを選択して、注文を更新してください。『ありがとう』🎉 and so on",
    'يرجى تحديث طلبي، وشكرًا جزيلًا! 🌹 "ممتاز" (5/5)',
    'She said "it\'s OK" & left; I waited from 9 to 10:30, then called 1-800-555-0100 #frustrated 😤',
    "100% satisfied!!! I'd do it again & again; my wife's opinion: \"having group lunches = great\" 🥗",
    "Having waited, I'd group them by age; count on me to order by phone. Values matter, don't they? 🫶",
    "Create a table for two, alter the date to May 5th, and grant me a discount ;-) 😉",
    "If you exec. staff declare a case, then end it; begin when the cast is set; I'd print the list @ noon.",
    "It's like '90s customer service: null and void. And 1 = 1st class? Or '2nd' as they say? 🙃",
    "Between you & me: not in the mood, is not null my patience?! -- A. O'Brien, 47",
    "Cat photos > dog photos 😹; echo that! Who am I to say... find me a time that works; sort it out.",
    "The sleep clinic (5) was loud; benchmark: my own bed. Wait for delay? No, thanks... 💤",
)


def _readable(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _collections() -> list[tuple[str, str]]:
    root = unpacked("prose", PACKAGES) / "usr" / "share" / "games" / "fortunes"
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix not in {".dat", ".u8"} and "off" not in path.parts
    ]
    return [(str(path.relative_to(root)), _readable(path)) for path in files if not path.is_symlink()]


def _entries(text: str) -> list[str]:
    found = (re.sub(r".\x08", "", entry).strip() for entry in re.split(r"\n%+\n", text))
    return [entry for entry in found if 20 <= len(entry) <= 2000 and not re.search(r"[\x00-\x08\x0b-\x1f]", entry)]


def answers(number: int) -> list[str]:
    """`number` answers in prose: a tenth remarks with emoji and SQL words, the rest by turns from every collection."""
    pools = [
        iter([entry for entry in _entries(text) if not _SIGNS.search(entry)])
        for name, text in _collections()
        if not _CODE.search(name)
    ]
    seen: set[str] = set()
    remarks = number // 10
    found: list[str] = []
    while pools and len(found) < number - remarks:
        for pool in list(pools):
            if (entry := next(pool, None)) is None:
                pools.remove(pool)
            elif entry not in seen:
                seen.add(entry)
                found.append(entry)
    found = found[: number - remarks]
    # Each remark beside a piece of prose of its own, so that no two are the same.
    found += [f"{remark} {entry}" for remark, entry in zip(islice(cycle(REMARKS), remarks), found, strict=False)]
    return found


def answers_with_code(number: int) -> list[str]:
    """Entries of the collections about computers, and any others that look like code."""
    found = [
        entry
        for name, text in _collections()
        for entry in _entries(text)
        if _SIGNS.search(entry) and (_CODE.search(name) or "{" in entry or "<" in entry)
    ]
    return found[:: max(1, len(found) // number)][:number]
