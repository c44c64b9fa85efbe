"""Talking to a model: in a terminal, through a pipe, and what can go wrong."""

import contextlib
import fcntl
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from graph_capture.cli.chat import Chat, Progress
from graph_capture.cli.main import app
from graph_capture.errors import CaptureError
from graph_capture.runtime.llm import Completion


class Tokenizer:
    chat_template = "one word, one token"


class Engine:
    """Says `script`, and interrupts itself before the piece of a given number."""

    def __init__(self, script=("All ", "is ", "well."), capacity=64, interrupt_at=None, tokenizer=Tokenizer):
        self.script, self.capacity, self.interrupt_at = script, capacity, interrupt_at
        self.tokenizer = tokenizer
        self.enable_fusion = True
        self.last = None
        self.prompts = []

    def encode_messages(self, messages):
        return [word for message in messages for word in message["content"].split()]

    def stream(self, prompt, **options):
        self.prompts.append(prompt if isinstance(prompt, str) else [message["content"] for message in prompt])
        if "fail" in self.prompts[-1]:
            raise CaptureError("no answer to [that]")
        for number, piece in enumerate(self.script):
            if number == self.interrupt_at:
                signal.raise_signal(signal.SIGINT)
            yield piece
        self.last = Completion("".join(self.script), list(range(len(self.script))), 3, "stop", 0.01, 0.03)

    def stats(self):
        return {"enable_fusion": self.enable_fusion, "captured": {"decode": 7}, "eager": {}, "rate": None}

    def explain(self):
        return "nothing [yet]"


def chat(engine, **options):
    consoles = [Console(file=io.StringIO(), width=200) for _ in range(2)]
    return Chat(engine, Progress(consoles[1]), *consoles, **options)


def printed(console):
    return console.file.getvalue()


def test_an_answer_is_streamed_and_timed():
    talk = chat(Engine())
    talk.answer("How are things?")
    talk.answer("Really?")
    assert printed(talk.out) == "All is well.\n" * 2
    assert printed(talk.notes) == "3 tokens, 100 tokens/s, first token after 10 ms, fusion on\n" * 2
    assert talk.engine.prompts[1] == ["How are things?", "All is well.", "Really?"]


def test_a_system_message_comes_first_and_stays():
    talk = chat(Engine(), system="Be brief.")
    talk.answer("a")
    talk.command("/reset")
    talk.answer("b")
    assert talk.engine.prompts == [["Be brief.", "a"], ["Be brief.", "b"]]


def test_the_oldest_turns_are_forgotten():
    talk = chat(Engine(capacity=16), system="S", max_new_tokens=6)  # ten words are left for the prompt
    for question in ("a", "b", "c", "d"):
        talk.answer(question)
    assert talk.engine.prompts[2] == ["S", "a", "All is well.", "b", "All is well.", "c"]
    assert talk.engine.prompts[3] == ["S", "b", "All is well.", "c", "All is well.", "d"]
    assert printed(talk.notes).count("the oldest 2 messages do not fit any more") == 1


def test_the_first_interrupt_stops_the_answer():
    talk = chat(Engine(interrupt_at=1))
    before = signal.getsignal(signal.SIGINT)
    talk.answer("a")
    assert signal.getsignal(signal.SIGINT) is before
    assert printed(talk.out) == "All is \n"
    assert printed(talk.notes) == "stopped\n"
    assert [message["content"] for message in talk.messages] == ["a", "All is "]


def test_the_second_interrupt_does_not_wait():
    class Stubborn(Engine):
        def stream(self, prompt, **options):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            yield "never said"

    talk = chat(Stubborn())
    talk.answer("a")
    assert printed(talk.out) == ""
    assert printed(talk.notes) == "stopped\n"
    assert talk.messages == []


def test_an_error_is_shown_and_the_conversation_goes_on():
    talk = chat(Engine())
    talk.answer("fail")
    assert talk.failed
    assert printed(talk.notes) == "CaptureError: no answer to [that]\n"
    talk.answer("a")
    assert talk.engine.prompts[-1] == ["a"]


def test_an_answer_cannot_steer_the_terminal():
    talk = chat(Engine(script=("\x1b[2J", "a\n", "\x07", "[bold]", "\x9b", "é")))
    talk.answer("a")
    assert printed(talk.out) == "\ufffd[2Ja\n\ufffd[bold]\ufffdé\n"


def test_progress_keeps_off_the_line_of_an_answer():
    class Busy(Engine):
        def stream(self, prompt, **options):
            talk.progress("recording the prefill")
            yield "4"
            talk.progress("recording the decode")
            yield "2"

    out, notes = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True, width=80)
    talk = Chat(Busy(), Progress(notes), out, notes)
    talk.answer("17+25=")
    assert printed(out) == "42\n"
    assert "recording the prefill" in printed(notes)
    assert "recording the decode" not in printed(notes)


def test_without_a_template_each_line_is_continued():
    talk = chat(Engine(tokenizer=None))
    talk.answer("a")
    talk.answer("b")
    assert talk.engine.prompts == ["a", "b"]


def test_commands():
    talk = chat(Engine())
    talk.command("/fusion", "off")
    assert not talk.engine.enable_fusion
    talk.command("/fusion")
    talk.command("/fusion", "on")
    assert talk.engine.enable_fusion
    talk.command("/stats")
    talk.command("/explain")
    talk.command("/help")
    assert not talk.failed
    for part in ("decode: 7", "nothing [yet]", "/fusion on|off"):
        assert part in printed(talk.out)
    assert printed(talk.notes) == "fusion off\nfusion off\nfusion on\n"
    talk.command("/fusion", "maybe")
    assert talk.failed
    assert "there is no command /fusion maybe" in printed(talk.notes)


class Counting(Engine):
    """Counts a token for each word, as the templated prompt has them."""

    def stream(self, prompt, **options):
        self.options = options
        yield from super().stream(prompt, **options)


def test_the_system_message_can_change_in_between():
    talk = chat(Counting(), system="Be brief.")
    talk.answer("a")
    talk.command("/system", "Be long.")
    talk.answer("b")
    assert talk.engine.prompts[1] == ["Be long.", "a", "All is well.", "b"]
    talk.command("/system", "off")
    talk.answer("c")
    assert talk.engine.prompts[2][0] == "a"


def test_options_are_set_for_the_answers_to_come():
    talk = chat(Counting())
    talk.command("/set", "temperature 0.5")
    talk.command("/set", "seed=7")
    talk.command("/set", "stop ,")
    talk.answer("a")
    assert talk.engine.options == {"max_new_tokens": 128, "temperature": 0.5, "seed": 7, "stop": ","}
    talk.command("/set", "seed default")
    talk.command("/set", "max_new_tokens default")
    talk.answer("a")
    assert talk.engine.options == {"max_new_tokens": 128, "temperature": 0.5, "stop": ","}
    assert not talk.failed
    talk.command("/set", "seed 1.5")
    assert "seed must be a whole number, got '1.5'" in printed(talk.notes)


def test_a_message_that_cannot_fit_costs_nothing_of_the_rest():
    talk = chat(Counting(capacity=20), max_new_tokens=4)
    talk.answer("one two")
    before = list(talk.messages)
    talk.answer("word " * 20)
    assert talk.failed
    assert talk.messages == before
    assert "20 tokens, and the cache 20 slots" in printed(talk.notes)
    talk.answer("word " * 15)  # fits alone, without what was said before
    assert len(talk.messages) == 2
    assert "the oldest 2 messages" in printed(talk.notes)


def test_a_kept_conversation_comes_back(tmp_path):
    talk = chat(Counting(), system="Be brief.")
    talk.answer("a")
    talk.command("/set", "top_k 3")
    talk.command("/save", str(tmp_path / "talk.json"))
    other = chat(Counting())
    other.command("/load", str(tmp_path / "talk.json"))
    assert other.messages == talk.messages
    assert other.options == talk.options
    other.answer("b")
    assert other.engine.prompts[0] == ["Be brief.", "a", "All is well.", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds no conversation"),
        ('{"talk": []}', "holds no conversation"),
        ('[{"role": "user", "content": 5}]', "holds no conversation"),
        ('[{"role": "captain", "content": "ay"}]', "holds no conversation"),
        ('{"messages": [], "options": {"top_p": 9}}', "top_p must be"),
        ('{"messages": [], "options": {"volume": 9}}', "no option 'volume'"),
        ('{"messages": [], "options": 3}', "no table"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(tmp_path, text, said):
    talk = chat(Counting())
    talk.answer("a")
    before = list(talk.messages), dict(talk.options)
    (tmp_path / "talk.json").write_text(text)
    talk.command("/load", str(tmp_path / "talk.json"))
    assert said in printed(talk.notes)
    assert (talk.messages, talk.options) == before


def test_contents_may_be_parts_or_nothing(tmp_path):
    parts = [{"type": "text", "text": "a "}, "b"]
    kept = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    (tmp_path / "talk.json").write_text(json.dumps(kept))
    talk = chat(Engine(tokenizer=None))
    talk.command("/load", str(tmp_path / "talk.json"))
    assert not talk.failed
    assert talk.messages == kept
    talk.answer("c")
    assert talk.engine.prompts == ["c"]


# --- the command


def invoke(*args, lines=b""):
    return CliRunner().invoke(app, ["chat", *args], input=lines)


def test_through_a_pipe():
    result = invoke("--max-new-tokens", "40", lines=b"17+25=\n\n/fusion off\nWhat is 17 plus 25?\n/quit\nHello\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "42\n42\n"
    assert re.search(r"2 tokens, \d+ tokens/s, first token after \d+ ms, fusion on\n", result.stderr)
    assert re.search(r"2 tokens, \d+ tokens/s, first token after \d+ ms, fusion off\n", result.stderr)


def test_bytes_that_are_no_text():
    result = invoke("--no-fusion", lines=b"17+25=\n\xff\xfe\n8+1=")
    assert result.exit_code == 1
    assert result.stdout == "42\n9\n"
    assert "the line is not UTF-8" in result.stderr


def test_a_prompt_that_does_not_fit():
    result = invoke("--no-fusion", lines=b"a" * 300 + b"\n17+25=\n")
    assert result.exit_code == 1
    assert result.stdout == "42\n"
    assert "256 slots" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_had(args, said):
    result = invoke(*args, "--no-fusion", lines=b"17+25=\n")
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert said in result.stderr


# --- a terminal


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *args):
        import pty
        import termios

        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "graph_capture.cli.main", "chat", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
            start_new_session=True,
            preexec_fn=prepare,
        )
        os.close(slave)
        self.text = ""

    def send(self, text):
        os.write(self.master, text.encode())

    def expect(self, pattern, seconds=300):
        """Read until the pattern comes up; what comes after it is left for the next."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 1)[0]:
                try:
                    more = os.read(self.master, 4096)
                except OSError:  # the other end is closed
                    more = b""
                assert more, f"no {pattern!r} in {self.text!r}"
                self.text = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", "", self.text + more.decode(errors="replace"))
        self.text = self.text[found.end() :]
        return found

    def interrupt(self):
        """Press Ctrl-C until the command ends: readline misses one that comes just before it waits for a key."""
        for _ in range(12):
            self.send("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(5)
        return None

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def open_terminal():
    pytest.importorskip("pty")
    opened = []

    def open_one(*args):
        opened.append(Terminal(*args))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


def test_in_a_terminal(open_terminal):
    terminal = open_terminal()
    rate = r"\d+ tokens/s, first token after \d+ ms, fusion "
    terminal.expect("> ")
    terminal.send("17+25=\n")
    terminal.expect(r"\n42\n")
    terminal.expect(rate + "on")
    terminal.send("/fusion off\n")
    terminal.expect("\nfusion off")
    terminal.send("What is 17 plus 25?\n")
    terminal.expect(r"\n42\n")
    terminal.expect(rate + "off")
    terminal.send("/stats\n")
    terminal.expect("tokens per second")
    terminal.send("/explain\n")
    terminal.expect(r"decode, greedy \(\d+ replays\)")
    terminal.expect("add_rms_norm")
    terminal.send("/help\n")
    terminal.expect(r"at the prompt\n> ")
    assert terminal.interrupt() == 0


@pytest.fixture(scope="module")
def shared_terminal(tmp_path_factory):
    """One conversation for the commands: each is typed, and what it prints is waited for."""
    pytest.importorskip("pty")
    terminal = Terminal("--no-fusion", "--max-length", "200")
    terminal.expect("> ")
    terminal.folder = tmp_path_factory.mktemp("talks")
    yield terminal
    terminal.close()


SCRIPT = {
    "/help": ["/load FILE +go on with one that was kept"],
    "/system Be brief.": ["the system message is set"],
    "/system": ["system message: Be brief."],
    "/system off": ["there is no system message"],
    "17+25=": [r"\n42\n", "fusion off"],
    "/set max_new_tokens 1": ["max_new_tokens 1"],
    "What is 17 plus 25?": ["1 tokens, .*cut off at the limit"],
    "/set max_new_tokens 30": ["max_new_tokens 30"],
    "/set temperature 0.7": ["temperature 0.7"],
    "/set": ["max_new_tokens 30, temperature 0.7"],
    "/set temperature default": ["temperature is as the model has it"],
    "/set temperature warm": ["temperature must be a number, got 'warm'"],
    "/set top_p 7": ["top_p must be above 0 and at most 1"],
    "/set volume 11": ["there is no option 'volume'"],
    "/save {folder}/talk.json": ["4 messages are in .*talk.json"],
    "/save {folder}/nowhere/talk.json": ["cannot be written"],
    "/reset": ["the conversation is forgotten"],
    "/load {folder}/talk.json": ["4 messages are back"],
    "/load {folder}/other.json": ["cannot be read"],
    "/load": ["/load takes the name of a file"],
    "/fusion": ["fusion off"],
    "/stats": ["enable fusion"],
    "/explain": ["nothing has been captured yet"],
    "/nonsense at all": ["there is no command /nonsense at all"],
}


@pytest.mark.parametrize("line", SCRIPT)
def test_a_command_in_a_terminal(shared_terminal, line):
    shared_terminal.send(line.format(folder=shared_terminal.folder) + "\n")
    for pattern in SCRIPT[line]:
        shared_terminal.expect(pattern)
    shared_terminal.expect("> ")
    assert shared_terminal.process.poll() is None


def test_what_is_pasted_is_one_message(shared_terminal):
    shared_terminal.send("/reset\n")
    shared_terminal.expect("forgotten\n> ")
    shared_terminal.send("\x1b[200~one\n/quit\nthree\x1b[201~")
    time.sleep(0.5)  # the user sees it, then presses the key
    shared_terminal.send("\n")
    shared_terminal.expect("first token after")
    shared_terminal.expect("> ")
    shared_terminal.send(f"/save {shared_terminal.folder}/pasted.json\n")
    shared_terminal.expect("2 messages are in")
    kept = json.loads((shared_terminal.folder / "pasted.json").read_text())
    assert kept["messages"][0] == {"role": "user", "content": "one\n/quit\nthree"}


def test_an_overlong_paste_leaves_the_conversation(shared_terminal):
    shared_terminal.send("x" * 230 + "\n")
    shared_terminal.expect("the message has .* tokens, and the cache 200 slots")
    shared_terminal.expect("> ")
    shared_terminal.send(f"/save {shared_terminal.folder}/after.json\n")
    shared_terminal.expect("2 messages are in")


def test_leaving_by_a_command(shared_terminal):
    shared_terminal.send("/quit\n")
    assert shared_terminal.process.wait(60) == 1  # some lines got no answer


def test_the_end_of_a_terminal(open_terminal):
    terminal = open_terminal("--no-fusion")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.process.wait(60) == 0
