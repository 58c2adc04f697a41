"""The page of troubleshooting lists every message that ends a program with a non-zero exit code, and no other.

UPDATE_GOLDEN=1 aligns the page with the source. Messages without a fix of their own then need words in the last column by hand.
"""

import os
import re

import doc_messages


def test_the_page_lists_every_message_and_no_other():
    page = doc_messages.PAGE.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_GOLDEN"):
        page = doc_messages.aligned(page)
        doc_messages.PAGE.write_text(page, encoding="utf-8")
    listed = doc_messages.rows(page)
    raised = {(message.area, message.parts[0]): message for message in doc_messages.messages()}
    assert not sorted(raised.keys() - listed.keys()), "messages that the page lacks; align it with UPDATE_GOLDEN=1"
    assert not sorted(listed.keys() - raised.keys()), "messages of the page that no program has any more"
    assert page == doc_messages.aligned(page)


def test_every_message_says_how_to_fix_it():
    rows = doc_messages.rows(doc_messages.PAGE.read_text(encoding="utf-8"))
    assert not [what for what, (_, advice) in rows.items() if len(re.findall(r"[a-z]{2,}", advice)) < 1]


def test_messages_are_read_from_all_forms(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "LIMIT = 3\n"
        "def one(x):\n    raise Mistake(f'--x {x}: more than {LIMIT} words; give fewer')\n"
        "def two(x):\n    text = f'no file {x}; give one'\n    raise exits.PlaceFailed(text) from None\n"
        "def three(x):\n    raise ValueError(f'{x}: {why(x)}')\n"
        "def why(x):\n    return 'not UTF-8; save it so' if x else f'cut off at {x}; fetch it again'\n"
        "def four(parser):\n    parser.error('--y: not together with --z; leave it out')\n"
        "def five(self):\n    self.text = f'host {self.name} is silent; look at its log'\n    raise HostsError(self.text)\n"
        "def six(error):\n    raise Mistake(str(error))\n    raise AssertionError('two words')\n"
    )
    assert sorted(set(doc_messages._of_file(path))) == [
        ("--x …: more than 3 words; give fewer", 2),
        ("--y: not together with --z; leave it out", 2),
        ("host … is silent; look at its log", 4),
        ("no file …; give one", 5),
        ("…: cut off at …; fetch it again", 2),
        ("…: not UTF-8; save it so", 2),
    ]
