"""The words of English captions as COCO's caption evaluation counts them.

COCO's package (pycocoevalcap 1.2) splits captions by the conventions of the Penn Treebank in a Java program. The rules here are
written from the conventions and from that program's output for captions of all kinds; the tests compare the two.
docs/benchmarks.md, "English captions", lists the known differences.
"""

import html
import re

Tokens = list[str]

# Titles, months, days, places, companies and others whose period is part of the word.
ABBREVIATIONS = (
    "mr mrs ms messrs mme mlle dr prof st sr jr rev hon esq gen col capt cpl pvt lt sgt maj cmdr adm det insp supt gov sen rep pres "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ave blvd rd sq ct mt ft bldg dept univ "
    "assn bros inc co corp ltd plc vs etc cf al est asst tel ext rt reps alex ph[.]d "
    "calif fla mich minn tenn wis ariz colo conn ga ind kan ky md mo nev okla va vt wyo ala"
).replace(" ", "|")
# One letter, digit or combining accent. Superscripts, fractions and number forms are symbols.
LETTER = r"(?:[^\W_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u218b\u2460-\u249b]|[\u0300-\u036f\u2010\u2011])"
APOSTROPHE = "['\u2019]"
INSIDE = "['`\u2018\u2019]"  # an apostrophe between letters
PART = rf"(?:[dlo]{INSIDE}(?={LETTER}{{2}}))?{LETTER}+"  # or o'brien, l'oreal
WORD = rf"{PART}(?:[-_]{PART})*"
END = rf"(?!{LETTER})"  # the word ends here
ALONE = rf"(?!['\u2019/-]?{LETTER})"  # and does not go on behind an apostrophe, a slash or a hyphen
STOP = r"(?:\.(?=[,;:]))?"  # a period before a comma belongs to the word
# Symbols that count. All characters that no rule names are dropped: quotes, dashes, periods, commas, most emoji.
SYMBOL = (
    r"[$%&()+/<=>@\[\\\]^{|}~\u00a1-\u00aa\u00ac\u00ae-\u00ba\u00bc-\u00bf\u00d7\u00f7\u201a\u201e\u2020-\u2022\u2030-\u2037"
    r"\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\uff01-\uff5e]"
)

# The first rule that fits takes the next token. A rule that looks ahead leaves the rest of the word for the next one: can|not.
TOKEN = re.compile(
    "|".join(
        [
            r"https?://[^\s\"<>()]+|www\.[^\s\"<>()]*\w|(?<![\w.-])\w[\w.-]*@\w[\w-]*(?:\.\w+)*",  # addresses
            r"</?[a-z]\w*>",  # markup
            rf">?[:=]-?[()]|;-?\)|[:;=]-?[dp]{END}|:-?\||:@|\^_\^|-_-",  # faces
            r"(?-i:(?:US|HK|A|C)\$(?=\d)|[A-Z]+&[A-Z]+\b)|c\+\+|[cf]\#",  # US$ 5, AT&T, C++
            r"\#[^\W\d_][^\W\d]*|@[a-z]\w*",  # tags and names of users
            rf"can(?=not{ALONE})|(?:gon|wan)(?=na{ALONE})|got(?=ta{ALONE})|(?:gim|lem)(?=me{ALONE})",  # can not, gon na
            rf"y{APOSTROPHE}(?=all|know)|'t(?=is|was)|{LETTER}+(?=n['`]t{END})|n['`]t{END}",  # y' all, 't is, do n't
            rf"'(?:s|d|m|ll|re|ve){END}",  # dog 's
            # Apostrophes within words: ma'am, hawai'i; at their ends: ol', dunkin'; at their beginnings: 'em, '90s.
            rf"{LETTER}+[aeiou]{INSIDE}[aeiou]{LETTER}*",
            rf"(?:c'mon|s{INSIDE}mores|cap{INSIDE}n|(?:ol|somethin|dunkin){APOSTROPHE}){END}",
            rf"'n'|\u2019n\u2019|{APOSTROPHE}(?:em|till?|cause|n{END})|{APOSTROPHE}[2-9]0s{END}|(?<!\w){APOSTROPHE}\d\d(?!\S)",
            rf"(?:(?:{LETTER}+-)*[a-z](?:\.[a-z])+|[a-z]|{ABBREVIATIONS})\.(?![^\W\d])(?:-{WORD})?",  # mr., u.s., u.s.-based, plan b.
            r"nos?\.(?=\s*\d)",  # no. 1
            rf"[a-z]{LETTER}*(?:[.?!][a-z]{LETTER}*)+(?:-{LETTER}+)*{STOP}",  # youtube.com, mr.bean
            rf"\d+(?:[.,]\d+)+(?:-{LETTER}+)+|(?<![.-])[+-]?\d*(?:[.,:]\d+)+{STOP}|(?<!-)[+-]\d+",  # 1.5-inch, 1,000, 5:30, -5
            r"[a-z0-9]+(?:-[a-z0-9]+)*(?:/[a-z0-9]+(?:-[a-z0-9]+)*){1,2}",  # and/or, 1/2
            rf"{WORD}{STOP}",
            r"[!?]{2,}|[#*_]+|<<|>>",
            SYMBOL,
        ]
    ),
    re.IGNORECASE,
)
SPELLED = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u20ac": "$", "\u00a3": "#", "\u00a2": "cents",
    "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
})  # fmt: skip
CURLY = re.compile(rf"\u2019(?=(?:s|d|m|ll|re|ve){END})|(?<=n)\u2019(?=t{END})", re.IGNORECASE)
ENTITY = re.compile("&(?:amp|lt|gt|quot|apos);")


def tokens(text: str) -> Tokens:
    """The words of an English caption as COCO's caption evaluation counts them.

    They are Penn Treebank tokens in lower case, without the punctuation that COCO drops. Brackets become -lrb- and the like.
    """
    text = ENTITY.sub(lambda found: f" {html.unescape(found[0])} ", text)
    return [token.lower().translate(SPELLED) for token in TOKEN.findall(CURLY.sub("'", text))]
