"""The token rules of the Penn Treebank tokenizer that pycocoevalcap runs (Stanford CoreNLP 3.4.1, default options).

At each position of a caption, every rule is tried. The rule with the longest match wins, its context after the token
included; among equal ones, the first wins. Lexer generators choose in this way. Therefore each pattern below has one
group, which is the token, and may match context after it. Patterns match the class string of `chars.py`, not the
caption: there, `é` stands for any letter outside ASCII. Words in `caseless` match in any case.

The list of rules comes from published versions of CoreNLP's lexer specification, older and newer than 3.4.1. What each
rule accepts was measured on the Java program, with more and more strings until no result differed
(`tests/test_ptb.py`). The rules reproduce the faults of the Java program, too.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from captioner.metrics.ptb.chars import DIGIT, LETTER, MARK, NBSP, SPACE

Action = str | int | Callable[[str], str] | None


class Rule(NamedTuple):
    """One kind of token.

    `action` makes the token from the matched text: None leaves it as it is, a string replaces it, a function maps it,
    and a number cuts so many characters off its end, which are then read again.
    """

    pattern: re.Pattern
    action: Action = None


def caseless(pattern: str) -> str:
    """Return a pattern that matches in any case; a part in `(?-i:...)` matches in its own case only."""
    return f"(?i:{pattern})"


# Sets of characters, without their brackets.
ALPHA = "A-Za-z"
LETTERS = rf"{ALPHA}{LETTER}\u0130\u0131\u017f\u212a"
DIGITS = f"0-9{DIGIT}"
ENTITY = rf"&[aeiouAEIOU]{caseless('(?:acute|grave|uml)')};"
FIRST = rf"(?:[{LETTERS}{MARK}\u00ad]|{ENTITY})"
LATER = rf"(?:[{LETTERS}{MARK}\u00ad{DIGITS}]|{ENTITY})"
GAP = rf"[ \t{NBSP}{SPACE}]"
BREAK = rf"[ \t{NBSP}{SPACE}\n\u0085]"

WORD = rf"{FIRST}{LATER}*(?:[.!?]{FIRST}{LATER}*)*"
QUOTE = r"[`\u2018\u2019\u201a-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]"
APOSTROPHE = rf"(?:['\u0092\u2019]|{caseless('&apos;')})"
ANY_APOSTROPHE = rf"(?:['`\u0092\u2019\u0091\u2018\u201b]|{caseless('&apos;')})"
AUXILIARY = rf"{APOSTROPHE}(?:[msdMSD]|{caseless('re|ve|ll')})"
NOT = rf"{caseless('n')}{ANY_APOSTROPHE}{caseless('t')}"
NUMBER = rf"(?:[{DIGITS}]*(?:[.:,\u00ad\u066b\u066c][{DIGITS}]+)+|[{DIGITS}]+)"
IN_SENTENCE = r"[,;:\u3001]"
DOTTED_STATES = caseless(r"(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)")
ACRONYM = rf"(?:{DOTTED_STATES}|[{ALPHA}](?:\.[{ALPHA}])*)"
NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
TAG = (
    rf"<(?:[!?][A-Za-z\-][^>\r\n]*|/{NAME}"
    rf"|{NAME}(?: +{NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?)* */?) *>"
)

BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}

CLOSING_ABBREVIATIONS = """
    Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec Mon Tues? Wed Thu Thurs Fri Ala Ariz (?-i:A)z (?-i:A)rk Calif Colo
    Conn Ct Dak (?-i:D)el Fla Ga (?-i:I)ll Ind Kans? Ky (?-i:L)a (?-i:M)ass Md Mich Minn (?-i:M)iss Mo Mont Neb Nev
    Okla (?-i:O)re (?-i:P)a Penn Tenn (?-i:T)ex Va Vt (?-i:W)ash Wisc? Wyo Inc Cos? Corp Pp?t(?-i:[ye])s? Ltd Plc Rt
    Bancorp Bhd Assn Univ Intl Sys tel est ext sq [JS]r Bros (?:Ed|Ph)\\.D Blvd Rd Esq etc al seq Bldg
"""
"""Abbreviations whose period may also end a sentence."""

LEADING_ABBREVIATIONS = """
    Mr Mrs Ms (?-i:M)iss Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl Pvt Capt Ste? Ave
    Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Mt Ft Adj Adv Asst Assoc Ens Insp Mlle Mme Msgr Sfc vs Alex Wm Jos
    Cie cf TREAS Ph Invt Elec Natl M(?-i:[ft])g Dept
"""
"""Abbreviations that never end a sentence."""

FILE_ENDINGS = """
    bat bmp c class cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt
    wav x xml zip
"""

SENTENCE_STARTS = """
    About According Additionally After An A As At But Did During Earlier He Her Here How However If In It Last Many
    More Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We When
    While What Who Why Yet You
"""
"""Capitalised words; the period of an acronym before one of them also ends the sentence."""


def one_of(words: str, wrap: Callable[[str], str] = caseless) -> str:
    """Return a pattern that matches any one of the words."""
    return wrap(f"(?:{'|'.join(words.split())})")


def _capitalised(alternatives: str) -> str:
    return "(?:" + "|".join(f"{word[0]}{caseless(word[1:])}" for word in alternatives[3:-1].split("|")) + ")"


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _plain_ampersands(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _opening_quotes(text: str) -> str:
    return "``" if text in ('"', "&quot;") else text


def _closing_quotes(text: str) -> str:
    text = re.sub('"|&quot;', "''", text.replace("&apos;", "'"))
    text = re.sub("[\u0091\u2018\u201b\u2039]", "`", re.sub("[\u0092\u2019\u203a]", "'", text))
    return re.sub("[\u0093\u201c\u00ab]", "``", re.sub("[\u0094\u201d\u00bb]", "''", text))


def _dashes(text: str) -> str:
    return "--" if len(text) in (3, 4) else text


def _lone_letter(text: str) -> str:
    return text[:-1] if len(text) == 2 else text


_URL_TAIL = r'[^ \t\n\f\r"<>|.!?(){},\-]'
_LIKELY_URL = (
    rf'(?:{caseless("www")}\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}'
    rf"|(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+{caseless('(?:com|net|org|edu)')})"
)
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_HYPHENED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[{ALPHA}](?:\.[{ALPHA}])+\.|[A-Za-z0-9\u00ad]+))+"
_PART = rf"(?:[dDoOlL]{ANY_APOSTROPHE}[{LETTERS}{DIGITS}])?[{LETTERS}{DIGITS}]+"
_THING = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_AND_NAME = rf"[A-Z]+(?:(?:[+&]|{caseless('&amp;')})[A-Z]+)+"
_ENDING = one_of(CLOSING_ABBREVIATIONS)
_LEADING = rf"(?:{one_of(LEADING_ABBREVIATIONS)}|{ACRONYM})"

# Apostrophes that belong to the word: French, dialect, clipped words.
_WORDS_WITH_APOSTROPHE = (
    rf"{APOSTROPHE}{caseless('n')}{APOSTROPHE}?",
    rf"[lLdDjJ]{APOSTROPHE}",
    rf"{caseless('(?:Dunkin|somethin|ol)')}{APOSTROPHE}",
    rf"{APOSTROPHE}{caseless('(?:em|till?|cause)')}",
    rf"[A-HJ-XZn]{ANY_APOSTROPHE}[{LETTERS}][{LETTERS}]+",
    rf"{APOSTROPHE}[2-9]0{caseless('s')}",
    rf"[{LETTERS}]+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z][{LETTERS}]*",
    caseless(r"(?:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"),
    rf"{caseless('O')}{ANY_APOSTROPHE}{caseless('o')}",
)

_TABLE: tuple[tuple[str, str, str, Action], ...] = (
    # kinds of its first character, pattern of the token, pattern of what must follow it, action
    ("wq", caseless("cannot|'twas"), "", 3),
    ("wq", caseless("'tis|gonna|gotta|lemme|gimme|wanna"), "", 2),
    ("w", rf"(?:{caseless('c')}\+\+|{caseless('[cf]')}#)", "", None),
    ("o", TAG, "", _unbroken),
    ("o&", rf"(?:{caseless('&(?:MD|mdash|ndash);')}|[\u0096\u0097\u2013\u2014\u2015])", "", "--"),
    ("&", caseless("&amp;"), "", _plain_ampersands),
    ("&", caseless("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"), "", None),
    ("wu&", WORD, AUXILIARY, _no_soft_hyphens),
    ("wu", r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT, _no_soft_hyphens),
    ("wu&", WORD, "", _no_soft_hyphens),
    *(("wuq&", pattern, "", None) for pattern in _WORDS_WITH_APOSTROPHE),
    ("w", rf"{caseless('y')}{APOSTROPHE}", f"[{LETTERS}]", None),
    ("w", rf'{caseless("https?")}://[^ \t\n\f\r"<>|(){{}}]+{_URL_TAIL}', "", None),
    ("wudqo&", _LIKELY_URL, "", None),
    ("wudqo&", rf'{_LIKELY_URL}/[^ \t\n\f\r"<>|()]+{_URL_TAIL}', "", None),
    (
        "wdo&",
        rf"(?:{caseless('&lt;')}|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{{}}]*@"
        rf"(?:[^ \t\n\f\r\"<>|(){{}}.\u00a0]+\.)*[^ \t\n\f\r\"<>|(){{}}.\u00a0]+(?:{caseless('&gt;')}|>)?",
        "",
        None,
    ),
    ("o", "@[a-zA-Z_][a-zA-Z_0-9]*", "", None),
    ("o", f"#{FIRST}+", "", None),
    ("q&", AUXILIARY, f"[^{ALPHA}]", _closing_quotes),
    ("w", NOT, f"[^{ALPHA}]", _closing_quotes),
    ("d", rf"[{DIGITS}]{{1,2}}[-/][{DIGITS}]{{1,2}}[-/][{DIGITS}]{{2,4}}", "", None),
    ("udo", rf"[-+]?{NUMBER}", "", _no_soft_hyphens),
    ("o", r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", "", None),
    ("d", rf"(?:[{DIGITS}]{{1,4}}[- \u00a0])?[{DIGITS}]{{1,4}}(?:\\?/|\u2044)[{DIGITS}]{{1,4}}", "", _unbroken),
    ("o", "\u00bc", "", "1/4"),
    ("o", "\u00bd", "", "1/2"),
    ("o", "\u00be", "", "3/4"),
    ("o", "\u2153", "", "1/3"),
    ("o", "\u2154", "", "2/3"),
    ("o", caseless("-[LR][RCS]B-"), "", None),
    ("wu", caseless(r"(?:C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls)"), "", _plain_ampersands),
    ("w", rf"(?:{caseless('cap')}{APOSTROPHE}{caseless('n')}|{caseless('c')}{APOSTROPHE}{caseless('est')})", "", None),
    ("wd", rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}", "", None),
    ("wo", r"(?:[A-Z]*\$|#)", "", None),
    ("o", "\u00a2", "", "cents"),
    ("o", "\u00a3", "", "#"),
    ("o", "[\u0080\u00a4\u20a0\u20ac]", "", "$"),
    ("wu", rf"{ACRONYM}\.", f"{BREAK}+(?:{one_of(SENTENCE_STARTS, _capitalised)}|{TAG}){BREAK}", _lone_letter),
    ("w", caseless(r"(?:ca|figs?|prop|nos?|art|pp|op)\."), f"{BREAK}?[{DIGITS}]", None),
    ("w", rf"(?:{caseless('pt')}[eyEY]|{caseless('co')})\.", f"{GAP}{caseless('(?:ltd|lim)')}", None),
    ("wu", rf"{_ENDING}\.", r"[\s\S][\s\S]", None),
    ("wu", rf"{_ENDING}\.", "", None),
    ("wu", rf"{_LEADING}\.", "", None),
    ("wu", _LEADING, GAP, None),
    ("wu", ACRONYM, BREAK, None),
    ("q&", rf"{APOSTROPHE}[0-9][0-9]", BREAK, None),
    ("wud&", rf"{LATER}+(?:\.{LATER}+)*\.{one_of(FILE_ENDINGS)}", rf"(?:{BREAK}|[.?!,])", None),
    ("wu&", rf"{WORD}\.", IN_SENTENCE, _no_soft_hyphens),
    (
        "do",
        r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
        r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        "",
        lambda text: _brackets(_unbroken(text)),
    ),
    ("do", r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", "", None),
    ("q&", rf'(?:"|{caseless("&quot;")})', "[A-Za-z0-9$]", _opening_quotes),
    ("q&", rf'(?:"|{caseless("&quot;")})', "", _closing_quotes),
    ("o&", rf"(?:<|{caseless('&lt;')})", "", "<"),
    ("o&", rf"(?:>|{caseless('&gt;')})", "", ">"),
    ("o", r"[<>]?[:;=][-o*']?[()DPdpO{@|\[\]\\]", "[^A-Za-z0-9]", _brackets),
    ("wo", rf"[\^x=~<>]\.\[\^{caseless('x')}=[^<\n]*<>\]", "", _brackets),
    (
        "wqo",
        r"(?:[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))",
        "",
        _brackets,
    ),
    *(("o", re.escape(mark), "", name) for mark, name in BRACKETS.items()),
    ("o", "-+", "", _dashes),
    ("o", r"(?:\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026])", "", "..."),
    ("o", r"(?:@+|\#+|_+)", "", None),
    ("o", r"(?:\*+|(?:\\\*){1,3})", "", None),
    ("o", IN_SENTENCE, "", None),
    ("o", "[?!]+", "", None),
    ("o", "[.=/]", "", None),
    ("wd", rf"{_HYPHENED}\.", IN_SENTENCE, _no_soft_hyphens),
    ("wd", _HYPHENED, "", _no_soft_hyphens),
    ("wud", rf"{_THING}\.", IN_SENTENCE, None),
    ("wud", _THING, "", None),
    ("w", rf"{_AND_NAME}\.", IN_SENTENCE, _plain_ampersands),
    ("w", _AND_NAME, "", _plain_ampersands),
    ("q", "'", r"[A-Za-z][^ \t\n\r\u00a0]", "`"),
    ("q&", AUXILIARY, "", _closing_quotes),
    ("w", NOT, "", _closing_quotes),
    ("q&", rf"(?:''|{QUOTE}{{1,2}}|{APOSTROPHE})", "", _closing_quotes),
    ("o", "(?:<<|>>)", "", None),
    ("o&", "[+%&~^|\\\\\u00a7\u00b2\u00b3\u00b9\u207a\u207b\u208a\u208b\u2044]", "", None),
    ("o&", rf"(?:{GAP}+|{caseless('&nbsp;')})", "", ""),
)

ALL_RULES = tuple((kinds, Rule(re.compile(f"({token}){after}"), action)) for kinds, token, after, action in _TABLE)
RULES = {kind: tuple(rule for kinds, rule in ALL_RULES if kind in kinds) for kind in "wudqo&"}
"""The rules that can match a token, by the kind of its first character (see `kind_of`)."""

LINK = re.compile(caseless(r"@|www\.|\.(?:com|net|org|edu)"))
"""Every address in a caption contains this. Without it, the slow rules for addresses are not tried."""
_ADDRESSES = tuple(rule for kinds, rule in ALL_RULES if kinds in ("wudqo&", "wdo&"))
RULES_WITHOUT_LINKS = {kind: tuple(rule for rule in rules if rule not in _ADDRESSES) for kind, rules in RULES.items()}


def kind_of(character: str) -> str:
    """Return the kind of a character of a class string: `w` ASCII letter, `u` other letter, `d` digit, `q` quote, `&`,
    `o` any other.
    """
    for kind, members in (
        ("w", f"[{ALPHA}]"),
        ("u", FIRST),
        ("d", f"[{DIGITS}]"),
        ("q", rf"['\"]|{QUOTE}"),
        ("&", "&"),
    ):
        if re.fullmatch(members, character):
            return kind
    return "o"
