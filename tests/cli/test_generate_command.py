"""`dsv4 generate` and `dsv4 chat` on an exported model with a byte vocabulary."""

import io
import json

import pytest
from support import TINY, random_params

from dsv4_jax import api, cli
from dsv4_jax.checkpoint import save
from dsv4_jax.cli import chat
from dsv4_jax.cli.generate import log_prob_lines
from dsv4_jax.errors import UserError
from dsv4_jax.inference.continuation import Event, TokenLogProb
from dsv4_jax.tokenizer import ByteTokenizer

BYTES = TINY.replace(vocab_size=288)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(folder, BYTES, random_params(BYTES), tokenizer=ByteTokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def expected(folder):
    """What the face gives for the prompt that most tests use."""
    return api.load(folder).generate("def f(", 8)


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command."""
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("command", ["generate", "sample"])
def test_the_text_comes_on_stdout_and_the_speed_on_stderr(folder, expected, capsys, command):
    asked = ("--prompt", "def f(", "--max-new-tokens", "8", "--temperature", "0")
    status, out, err = run(capsys, command, folder, *asked)
    assert status == 0 and out == f"def f({expected}\n"
    assert "8 tokens, the first after " in err and " tokens/s" in err


def test_a_prompt_is_read_from_a_file_or_stdin(folder, expected, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("def f(")
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    for source in (str(tmp_path / "prompt.txt"), "-"):
        asked = ("--prompt-file", source, "--max-new-tokens", "8", "--temperature", "0")
        assert run(capsys, "generate", folder, *asked)[:2] == (0, expected + "\n")


def test_samples_are_numbered_and_log_probabilities_listed(folder, capsys):
    asked = ("--prompt", "ab", "--n", "2", "--seed", "1", "--max-new-tokens", "3", "--logprobs", "1")
    status, out, err = run(capsys, "generate", folder, *asked)
    assert status == 0 and "[1 of 2] ab" in out and "[2 of 2] ab" in out
    assert sum(line.startswith(("[1] ", "[2] ")) and " of " in line for line in err.splitlines()) == 6
    assert run(capsys, "generate", folder, *asked)[1] == out  # a seed repeats the choices


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "both given"),
        (["--prompt-file", "nowhere.txt"], "no file nowhere.txt"),
        (["--top-p", "0"], "top_p is 0"),
        (["--n", "2", "--temperature", "0"], "would all be the same"),
        (["--max-new-tokens", "2000000"], "more than the model's"),
    ],
)
def test_impossible_requests_end_with_status_2_and_a_sentence(folder, capsys, asked, words):
    status, _, err = run(capsys, "generate", folder, *asked)
    assert status == 2 and words in err


@pytest.mark.parametrize(
    ("name", "instead"), [("v4-flash", "download the release"), ("mini", "train one with `dsv4 train mini`")]
)
def test_the_name_of_a_preset_is_no_model_and_the_error_says_what_to_do(capsys, monkeypatch, tmp_path, name, instead):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "generate", name, "--prompt", "x")
    assert status == 2 and f"{name} is a preset, an architecture without weights; {instead}" in err


def test_what_does_not_fit_the_model_is_said_before_its_weights_are_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("the weights were read"))
    assert "from 0 (plain decoding)" in run(capsys, "generate", folder, "--speculative", "99")[2]
    assert "no tokenizer at" in run(capsys, "generate", folder, "--tokenizer", "none.json")[2]
    (tmp_path / "config.json").write_text((api.Path(folder) / "config.json").read_text())
    for command in ("generate", "chat"):
        status, _, err = run(capsys, command, str(tmp_path))
        assert status == 2 and "there is no tokenizer.json" in err


def test_help_shows_examples(capsys):
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert f"dsv4 {command} runs/nano" in capsys.readouterr().out
    assert "generate" in cli.usage() and "chat" in cli.usage()


@pytest.fixture
def prompts(monkeypatch):
    """The messages of every prompt that a chat encodes."""
    import dsv4_jax.chat as room

    seen, encode = [], room.encode_chat

    def spy(tokenizer, messages, *rest, **options):
        seen.append([(message["role"], message["content"]) for message in messages])
        return encode(tokenizer, messages, *rest, **options)

    monkeypatch.setattr(room, "encode_chat", spy)
    return seen


def test_a_conversation_goes_on_until_it_is_reset(folder, capsys, monkeypatch, prompts):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nMore\n/reset\nAnew\n/exit\nnever\n"))
    asked = ("--system", "S", "--max-new-tokens", "6", "--temperature", "0")
    status, out, err = run(capsys, "chat", folder, *asked)
    assert status == 0 and "a new conversation" in err
    answer = prompts[1][2][1]
    assert prompts == [
        [("system", "S"), ("user", "Hi")],
        [("system", "S"), ("user", "Hi"), ("assistant", answer), ("user", "More")],
        [("system", "S"), ("user", "Anew")],
    ]
    assert answer and out.startswith(answer + "\n")


def test_a_conversation_that_fills_the_model_says_so(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there, this is long\n"))
    config = json.loads((path := api.Path(folder) / "config.json").read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 16}))
    try:
        assert "fills the model: /reset" in run(capsys, "chat", folder)[2]
    finally:
        path.write_text(json.dumps(config))
    assert run(capsys, "chat", folder, "--effort", "max")[0] == 2


def test_a_refused_message_does_not_join_the_conversation():
    class Full:
        config = BYTES

        def stream(self, prompts, options):
            raise UserError("no room")

    conversation = chat.Conversation(chat.Chat("x"), Full(), ByteTokenizer())
    with pytest.raises(UserError, match="no room"):
        list(conversation.answer("Hi"))
    assert conversation.messages == []


def test_tokens_beyond_the_tokenizers_vocabulary_have_a_number():
    found = TokenLogProb(97, -0.5, ((97, -0.5), (287, -1.0)))
    [line] = log_prob_lines([Event(0, 0, (97,), log_probs=(found,))], ByteTokenizer())
    assert line == "[1] 'a' -0.500   of 'a' -0.500, token 287 -1.000"


def test_reasoning_is_dimmed_on_a_terminal(capsys, monkeypatch):
    from dsv4_jax.chat import Event as Said

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    chat.show(iter([Said("reasoning", "why"), Said("content", "so"), Said("problem", "odd")]))
    assert capsys.readouterr() == (f"{chat.DIM}why{chat.BRIGHT}so\n", "(odd)\n")
