"""Laws of what is printed: no key is shown, no outside text acts on a terminal, a page or a log."""

import ast
import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.configuration.config import run_entry
from cluster.configuration.keys import shown
from cluster.console.errors import ConfigError
from cluster.console.printable import PrintableStream, printable, without_keys
from cluster.console.terminal import Terminal
from cluster.sessions.session import PROJECT

# 16 characters: found in a message, it is no coincidence.
SECRETS = st.text("abcdefABCDEF0123456789/+=-_.~%$!*,;:@", min_size=16, max_size=40).map(
    lambda key: f"k{key}k"
)
USERS = st.sampled_from(["AKIAPLANTED", "user", ""])
OF_BUCKETS = st.sampled_from(["s3://", "_s3://", "9s3:/", "s3:/", "s3:", "S3://", "gs://", "gs:/", "s3a://"])
OF_SERVERS = st.sampled_from(["http://", "https://", "ray://", "redis://"])
AROUND = st.sampled_from(
    ["{}", "run.storage={}: no", '"{}"', "['{}']", "({}) is away", "a=1\nat {}\n", "{} and {}"]
)


@settings(max_examples=50)
@given(OF_BUCKETS, USERS, SECRETS, st.sampled_from(["@bucket/x", "@bucket", "@"]), AROUND)
def test_the_key_of_a_bucket_is_hidden_however_it_is_spelled(scheme, user, secret, rest, around) -> None:
    told = without_keys(around.replace("{}", f"{scheme}{user}:{secret}{rest}"))
    assert secret not in told and "***" in told


@given(OF_BUCKETS, USERS, SECRETS, st.integers(1, 40))
def test_a_key_is_hidden_that_was_cut_before_the_host(scheme, user, secret, length) -> None:
    assert secret[:length] not in without_keys(f"{scheme}{user}:{secret[:length]}...").partition("***")[0]


@given(OF_SERVERS, USERS, SECRETS.map(lambda key: re.sub("[/@]", "x", key)), AROUND)
def test_the_password_of_a_servers_url_is_hidden(scheme, user, secret, around) -> None:
    told = without_keys(around.replace("{}", f"{scheme}{user}:{secret}@host:9000/bucket/x"))
    assert secret not in told and "***@host:9000/bucket/x" in told


@given(
    st.sampled_from(
        ["X-Amz-Signature", "X-Amz-Security-Token", "sig", "Signature", "X-Goog-Signature", "token"]
    ),
    st.text("abcdef0123456789/+=%", min_size=8),
)
def test_a_signature_in_a_query_is_hidden_and_the_rest_stays(name, secret) -> None:
    told = without_keys(f"cannot read https://host/b/x?a=1&{name}={secret}&z=2")
    assert told == f"cannot read https://host/b/x?a=1&{name}=***&z=2"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b:c is a location",
        "s3://bucket: nothing is there; correct the URI",
        "gs://bucket/x",
        "file:///a:b@c/x",
        "http://127.0.0.1:8080/a@b",
        'endpoint URL: "http://[::1]:9000/bucket"',
        "http://host:9: refused",
        "ray://head:10001 does not answer",
        "give host:port, or ray://host:port; check that a head runs there",
        "mail a@b.c: key=value",
        "metrics: 3:4@5",
    ],
)
def test_a_location_without_a_key_stays_as_it_is(text: str) -> None:
    assert without_keys(text) == text


@given(st.text())
def test_printable_text_is_one_line_without_control_characters_and_stays_as_it_is(text: str) -> None:
    told = printable(text)
    assert not [c for c in told if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert printable(told) == told
    told.encode()


def test_text_of_all_languages_is_printable() -> None:
    text = "Äpfel 中文 العربية नमस्ते 👩‍👩‍👧 𝔘"
    assert printable(text) == text


def stream() -> tuple[PrintableStream, io.StringIO]:
    output = io.StringIO()
    return PrintableStream(output), output


@given(st.text("\x1b[]0123456789;mHJKhl\x07\x08\x9b\u202eab"))
def test_nothing_that_a_process_prints_moves_the_cursor_or_rings(text: str) -> None:
    printing, output = stream()
    print(text, file=printing)
    left = re.sub(r"\x1b\[(\d+)?m", "", output.getvalue())
    assert not [c for c in left if unicodedata.category(c) == "Cc" and c not in "\t\n\r"]


def test_the_colours_of_forwarded_lines_stay_and_json_stays_json() -> None:
    printing, output = stream()
    print("\x1b[36m(worker pid=7)\x1b[0m done", file=printing)
    assert output.getvalue() == "\x1b[36m(worker pid=7)\x1b[0m done\n"
    printing, output = stream()
    text = "a\x9b\u202eb\x7f"
    print(json.dumps(text, ensure_ascii=False), file=printing)
    assert json.loads(output.getvalue()) == text and output.getvalue().isascii()


def test_a_name_that_no_stream_can_encode_is_printed() -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    print("\udcff.jsonl", file=PrintableStream(output), flush=True)
    assert output.buffer.getvalue() == b"\\xff.jsonl\n"


@pytest.mark.parametrize(
    "name", ["[/b]", "[red]x", ":x:", "\x1b[2J\x1b[1;1H", "a\rb", "[link=http://x]y[/link]"]
)
def test_a_console_prints_names_as_they_are(name: str) -> None:
    output = io.StringIO()
    console = Terminal(file=output, force_terminal=True, width=80, color_system="standard")
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(f"corpus {name}", table, highlight=False)
    plain = re.sub(r"\x1b\[[\d;]*m", "", output.getvalue())
    assert plain.count(printable(name)) == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", plain)


def test_a_live_line_is_drawn_over_itself_while_what_others_print_stays_printable(monkeypatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")

    def main() -> None:
        console = Terminal(force_terminal=True, color_system="standard")
        with Live(console=console, auto_refresh=False) as live:
            live.update(Text("step 1"), refresh=True)
            print("a record \x1b[2J[/b] at s3://KEY:PLANTED@bucket")
            live.update(Text("step 2\x1b[2J"), refresh=True)

    run_entry(main)
    told = screen.getvalue()
    assert "\x1b[2K" in told and "\\u001b[2K" not in told, "the line before was not wiped"
    assert "\x1b[2J" not in told and "PLANTED" not in told and "[/b]" in told


def test_a_console_hides_a_key_before_it_breaks_the_line() -> None:
    output = io.StringIO()
    Terminal(file=output, width=20).print("corpus.uri=s3://KEYKEYKEY:PLANTEDPLANTEDPLANTED@bucket/x")
    assert "PLANT" not in output.getvalue().replace("\n", "")


def test_a_value_in_a_message_hides_its_key_before_it_is_cut() -> None:
    uri = f"s3://KEY:{'PLANTED' * 10}@bucket"
    assert "PLANTED" not in shown({"a": uri}) and "PLANTED" not in str(ConfigError([f"a={uri} is wrong"]))


def test_a_traceback_and_a_last_word_of_an_entry_show_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    told = "http://user:PLANTED@host/x"

    def fault() -> None:
        raise ZeroDivisionError(told)

    with pytest.raises(ZeroDivisionError):
        run_entry(fault)
    sys.excepthook(*fault_of(fault))
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: sys.exit(told))
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert shown.err.count("http://***@host/x") == 2 and "PLANTED" not in shown.out + shown.err


def fault_of(function):
    try:
        function()
    except ZeroDivisionError as error:
        return type(error), error, error.__traceback__


def sources() -> list[Path]:
    return [path for top in ("cluster", "data", "trainers", "tune") for path in (PROJECT / top).rglob("*.py")]


def test_consoles_are_made_in_one_place_and_markup_in_one() -> None:
    makers: dict[str, set[str]] = {"Console": set(), "Markup": set(), "from_markup": set()}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in makers:
                makers[called].add(str(path.relative_to(PROJECT)))
    assert makers == {"Console": set(), "Markup": {"trainers/reporting/charts.py"}, "from_markup": set()}


def test_no_page_takes_text_for_markup_and_each_forbids_scripts() -> None:
    pages = [path for top in ("trainers", "tune") for path in (PROJECT / top).rglob("*.html")]
    assert len(pages) >= 4
    for page in pages:
        text = page.read_text()
        assert "safe" not in re.findall(r"\|\s*(\w+)", text) and "autoescape" not in text, page
        assert "Content-Security-Policy" in text and "default-src 'none'" in text, page
