"""squad_utils: readers, prompts and scoring; and negatives."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import types
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.text import fold
from context_qa.negatives import NEGATIVE_KINDS, NegativeSampler
from squad_utils import (
    NO_ANSWER,
    PROMPT_ORDERS,
    Example,
    abstains,
    answer_text,
    exact_match,
    f1_score,
    folded_answer,
    is_correct,
    is_scored_as_empty,
    normalize_answer,
    prompt_parts,
    read_examples,
    same_question,
)

ROOT = Path(__file__).parents[1]
SQUAD = ROOT.parent / "shared/data/squad"
needs_squad = pytest.mark.skipif(not SQUAD.exists(), reason=f"real data not present: {SQUAD}")

OXEN_ROW = {"context": "Bo is a cat.", "prompt": "What is Bo?", "response": "a cat"}
HUB_ROW = {
    "id": "q7",
    "title": "Cats",
    "context": "Bo is a cat.",
    "question": "What is Bo?",
    "answers": {"text": ["a cat", "cat"], "answer_start": [6, 8]},
}


def squad_json(*qas: dict) -> dict:
    paragraph = {"context": "Bo is a cat.", "qas": list(qas)}
    return {"version": "v2.0", "data": [{"title": "Cats", "paragraphs": [paragraph]}]}


def as_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def read(tmp_path):
    """Read the given bytes, or rows, as a data file."""

    def read_bytes(*rows: object, name: str = "data.txt") -> list[Example]:
        path = tmp_path / name
        path.write_bytes(rows[0] if isinstance(rows[0], bytes) else as_lines(*rows))
        return read_examples(str(path))

    return read_bytes


def test_oxen_layout(read):
    known, unknown = read(OXEN_ROW, OXEN_ROW | {"response": " i don't KNOW "})
    assert (known.context, known.question, known.answers) == (
        "Bo is a cat.",
        "What is Bo?",
        ("a cat",),
    )
    assert known.is_answerable and known.target == "a cat" and known.article is None
    assert not unknown.is_answerable and unknown.answers == () and unknown.target == NO_ANSWER


def test_hugging_face_layout(read):
    listed = {"context": "c", "question": "q", "answers": ["x", "y"], "id": 12, "title": None}
    first, second, third = read(HUB_ROW, listed, HUB_ROW | {"answers": {"text": []}})
    assert first == Example("q7", "Bo is a cat.", "What is Bo?", ("a cat", "cat"), "Cats")
    assert second == Example("12", "c", "q", ("x", "y"), None)
    assert third.answers == ()


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["squad.json", "squad.jsonl"])
def test_squad_json(read, indent, name):
    known = {"id": "1", "question": "What?", "answers": [{"text": "a cat", "answer_start": 6}]}
    impossible = {"id": "2", "question": "Who?", "answers": [], "is_impossible": True}
    # Some versions of SQuAD have a plausible but wrong answer in `answers` here.
    tempting = known | {"id": "3", "is_impossible": True}
    document = json.dumps(squad_json(known, impossible, tempting), indent=indent)
    examples = read(document.encode(), name=name)
    assert examples[0] == Example("1", "Bo is a cat.", "What?", ("a cat",), "Cats")
    assert [(example.id, example.answers) for example in examples[1:]] == [("2", ()), ("3", ())]


def test_a_reference_that_is_empty_when_normalised_is_kept(read):
    (example,) = read(OXEN_ROW | {"response": "The"})
    assert example.answers == ("The",)


def test_extra_keys_blank_lines_bom_and_line_ends(read):
    data = b"\xef\xbb\xbf\n" + as_lines(OXEN_ROW | {"extra": [1]}, OXEN_ROW).replace(b"\n", b"\r\n")
    assert len(read(data + b"\n  \n")) == 2
    assert len(read(as_lines(OXEN_ROW).rstrip(b"\n"))) == 1


def test_unescaped_line_separators_stay_in_the_text(read):
    context = "one\u2028two\u2029three\x85four\u000bfive"
    row = json.dumps(OXEN_ROW | {"context": context}, ensure_ascii=False).replace(
        "\u000b", "\\u000b"
    )
    assert "\u2028" in row
    (example,) = read(row.encode())
    assert example.context == context


def test_made_ids_are_stable_and_differ_by_content(read):
    rows = [OXEN_ROW, OXEN_ROW | {"prompt": "Who?"}, OXEN_ROW | {"response": NO_ANSWER}]
    ids = [example.id for example in read(*rows)]
    assert ids[0] == "2ddfaee117f010d7"
    assert len(set(ids)) == 3
    assert [example.id for example in read(*reversed(rows))] == ids[::-1]


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    return stream.getvalue()


TEXT = json.dumps(OXEN_ROW)
OTHER_FORMATS = {
    "gzip": (gzip.compress(TEXT.encode(), mtime=0), "is compressed with gzip; decompress it"),
    "xz": (lzma.compress(TEXT.encode()), "is compressed with xz; decompress it"),
    "bzip2": (bz2.compress(TEXT.encode()), "is compressed with bzip2; decompress it"),
    "zip": (zipped(), "is a ZIP archive or an office document"),
    "parquet": (b"PAR1\x15\x04\x15", "is a Parquet file; convert it to JSONL"),
    "UTF-16": (TEXT.encode("utf-16"), "is UTF-16 text; convert the file to UTF-8"),
    "big-endian UTF-16": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16 text"),
    "safetensors": (b"\xf8\0\0\0\0\0\0\0{}", "is a binary file, not text; give a JSONL"),
}


@pytest.mark.parametrize(
    ("data", "place", "complaint"),
    [
        (b"", "", "contains no questions"),
        (b"\n \n", "", "contains no questions"),
        (json.dumps(squad_json()).encode(), "", "contains no questions"),
        (as_lines(OXEN_ROW) + b'{"context": "a', " line 2", "not JSON"),
        (b"{'context': 'a'}\n" + as_lines(OXEN_ROW), " line 1", "not JSON"),
        (as_lines([OXEN_ROW]), " line 1", "not a JSON object"),
        (b"[" * 100_000, " line 1", "nested too deep"),
        (as_lines(OXEN_ROW | {"more": nested(70)}), " line 1", "nested more than 64 levels"),
        (as_lines(HUB_ROW | {"answers": {"text": nested(60)}}), " line 1", "'answers' is [["),
        (as_lines(HUB_ROW | {"answers": {"text": {"0": "a"}}}), " line 1", "'answers' is missing"),
        (as_lines(HUB_ROW | {"answers": [None]}), " line 1", "'answers' is missing"),
        (as_lines(OXEN_ROW | {"context": float("nan")}), " line 1", "'context' is nan"),
        (b'{"context": ' + b"1" * 5000 + b"}", " line 1", "not JSON"),
        (as_lines(OXEN_ROW | {"id": 1.5}), " line 1", "'id' is 1.5; a row needs text in id, or no"),
        (as_lines(OXEN_ROW | {"id": True}), " line 1", "'id' is True; a row needs text in id"),
        (as_lines(OXEN_ROW | {"id": ["q"]}), " line 1", "'id' is ['q']; a row needs text in id"),
        (as_lines(OXEN_ROW, {"prompt": "q", "response": "r"}), " line 2", "'context' is missing"),
        (as_lines({"context": "c", "response": "r"}), " line 1", "'prompt' is missing"),
        (as_lines({"context": "c", "prompt": "q"}), " line 1", "'response' is missing"),
        (as_lines({"context": "c", "question": "q"}), " line 1", "'answers' is missing"),
        (as_lines(OXEN_ROW | {"context": 3}), " line 1", "'context' is 3"),
        (as_lines(OXEN_ROW | {"prompt": " \n"}), " line 1", "'prompt' is ' \\n'"),
        (as_lines(OXEN_ROW | {"context": ""}), " line 1", "'context' is ''"),
        (as_lines(HUB_ROW | {"answers": "a cat"}), " line 1", "'answers' is missing or not a list"),
        (
            as_lines(HUB_ROW | {"answers": {"text": "a"}}),
            " line 1",
            "'answers' is missing or not a",
        ),
        (as_lines(HUB_ROW | {"answers": ["cat", 1]}), " line 1", "'answers' is 1"),
        (
            as_lines(HUB_ROW | {"title": ["Cats"]}),
            " line 1",
            "'title' is ['Cats']; a row needs text in title, or no title",
        ),
        (as_lines(HUB_ROW | {"id": ""}), " line 1", "'id' is ''; a row needs text in id, or no id"),
        (b'{"context": "\\ud800", "prompt": "q", "response": "r"}', " line 1", "'\\ud800'"),
        ("\n\n{'é'}".encode("latin-1"), " line 3", "not UTF-8"),
        ("ÿ".encode("latin-1"), " line 1", "not UTF-8"),
        *(pytest.param(data, "", what, id=name) for name, (data, what) in OTHER_FORMATS.items()),
        (b'{"data": 3}', " data", "not SQuAD JSON"),
        (b'{"data": [{"paragraphs": {"context": "c"}}]}', " data", "not SQuAD JSON"),
        (b'{"data": [{"title": "t"}]}', " data", "not SQuAD JSON"),
        (
            json.dumps(squad_json({"id": "1", "answers": []})).encode(),
            " data[0].paragraphs[0].qas[0]",
            "'question' is missing",
        ),
        (
            json.dumps(squad_json({"question": "q", "answers": []}, {"question": "q"})).encode(),
            " data[0].paragraphs[0].qas[1]",
            "'answers' is missing",
        ),
    ],
)
def test_errors_of_files_are_one_line_with_the_place(read, tmp_path, data, place, complaint):
    with pytest.raises(UserError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'data.txt'}{place}: ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_missing_file_and_directory(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot be read .*; give a JSONL or SQuAD JSON file"):
        read_examples(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rajpurkar/squad", "someone/no-such-data"])
def test_a_hub_data_set_without_a_split(name):
    with pytest.raises(UserError, match=f"give a split, as in {name}:train or {name}:validation"):
        read_examples(name)


@pytest.mark.parametrize("layout", ["jsonl", "squad"])
def test_a_pipe_is_read_once(tmp_path, layout):
    """As bash's <(...) is."""
    document = squad_json({"question": "q", "answers": [{"text": "a cat"}]})
    data = as_lines(OXEN_ROW) if layout == "jsonl" else json.dumps(document).encode()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert read_examples(str(pipe))[0].target == "a cat"
    writer.join()


def test_hub_data_set(monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return [HUB_ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_examples("rajpurkar/squad:train[:1]")[0].id == "q7"
    assert asked == [("rajpurkar/squad", "train[:1]")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "(no network)"),
        (FileNotFoundError("Dataset 'a/b' doesn't exist\nmore"), "(Dataset 'a/b' doesn't exist)"),
        (ValueError('Unknown split "c"'), '(Unknown split "c")'),
    ],
)
def test_hub_errors_are_reported_in_one_line(monkeypatch, error, reason):
    def load_dataset(name: str, split: str):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as caught:
        read_examples("a/b:c")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_local_file_has_precedence_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name:train").write_bytes(as_lines(OXEN_ROW))
    assert read_examples("owner/name:train")[0].target == "a cat"


@needs_squad
@pytest.mark.parametrize(
    ("name", "questions", "answerable", "references", "contexts"),
    [
        ("dev-v1.1.json", 10_570, 10_570, 34_726, 2_067),
        ("dev-v2.0.json", 11_873, 5_928, 20_302, 1_204),
        ("squad_val_1k.jsonl", 1_000, 1_000, 1_000, 803),
    ],
)
def test_counts_of_real_data(name, questions, answerable, references, contexts):
    examples = read_examples(str(SQUAD / name))
    assert len({example.id for example in examples}) == len(examples) == questions
    assert sum(example.is_answerable for example in examples) == answerable
    assert sum(len(example.answers) for example in examples) == references
    assert len({example.context for example in examples}) == contexts


def test_import_is_light():
    code = (
        "import sys, squad_utils;"
        "print([m for m in ('torch', 'numpy', 'datasets', 'bm25s') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("prompt_order", "prefix", "suffix"),
    [
        ("context_first", "Bo {is}.", "\n\nQ: Who?\nA:"),
        ("question_first", "Q: Who?\n\nBo {is}.", "\n\nA:"),
        ("read_twice", "Bo {is}.\n\nQ: Who?\n\nBo {is}.", "\n\nQ: Who?\nA:"),
        ("question_only", "", "\n\nQ: Who?\nA:"),
    ],
)
def test_prompt_parts(prompt_order, prefix, suffix):
    assert prompt_order in PROMPT_ORDERS
    assert prompt_parts("Bo {is}.", "Who?", prompt_order) == (prefix, suffix)
    assert answer_text("A cat") == " A cat"


def test_context_first_is_the_default_and_unknown_orders_are_named():
    assert prompt_parts("c", "q") == prompt_parts("c", "q", "context_first")
    with pytest.raises(UserError, match=r"'last'.*context_first, question_first, read_twice"):
        prompt_parts("c", "q", "last")


def articles(num_articles: int = 6, num_paragraphs: int = 5) -> list[Example]:
    """Two questions a paragraph, the second unanswerable; numbers recur across paragraphs."""
    examples = []
    for a in range(num_articles):
        for p in range(num_paragraphs):
            context = (
                f"In town{a} the river{p} is {p % 3} miles long - by the town{a}-river{p} map."
            )
            asked = f"How long is river{p} in town{a}?"
            article = f"Town {a}"
            examples += [
                Example(f"{a}-{p}-long", context, asked, (f"{p % 3} miles", f"{p % 3}"), article),
                Example(f"{a}-{p}-deep", context, f"How deep is river{p}?", (), article),
            ]
    return examples


def contains(context: str, answer: str) -> bool:
    """An independent check, for answers without punctuation or articles."""
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", context.lower()) is not None


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_negatives_are_other_contexts_without_the_answer(kind):
    examples = articles()
    sampler = NegativeSampler(examples, kind, seed=1)
    known = {example.context for example in examples}
    for epoch in range(4):
        drawn = sampler.draw_contexts(epoch)
        assert len(drawn) == len(examples)
        for example, context in zip(examples, drawn, strict=True):
            assert context in known - {example.context}
            assert not any(contains(context, answer) for answer in example.answers)


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_negatives_are_a_function_of_seed_epoch_and_id(kind):
    examples = articles()
    sampler = NegativeSampler(examples, kind, seed=1)
    first, second = sampler.draw_contexts(0), sampler.draw_contexts(1)
    assert sampler.draw_contexts(0) == first  # no state is carried from one call to the next
    assert NegativeSampler(examples, kind, seed=1).draw_contexts(0) == first
    shuffled = random.Random(0).sample(examples, len(examples))
    by_id = {example.id: context for example, context in zip(examples, first, strict=True)}
    assert NegativeSampler(shuffled, kind, seed=1).draw_contexts(0) == [
        by_id[e.id] for e in shuffled
    ]
    changes = sum(a != b for a, b in zip(first, second, strict=True))
    assert changes > len(examples) / 4
    reseeded = NegativeSampler(examples, kind, seed=2).draw_contexts(0)
    assert sum(a != b for a, b in zip(first, reseeded, strict=True)) > len(examples) / 4


def test_a_question_asked_twice_of_one_context_gets_negatives_by_id():
    example = articles()[0]
    examples = [replace(example, id=str(i)) for i in range(20)] + articles()
    assert len(set(NegativeSampler(examples, seed=0).draw_contexts(0)[:20])) > 3


def test_draws_are_the_same_in_every_process(read, tmp_path):
    rows = [
        {
            "id": example.id,
            "context": example.context,
            "question": example.question,
            "answers": example.answers,
            "title": example.article,
        }
        for example in articles()
    ]
    here = [NegativeSampler(read(*rows), kind, seed=3).draw_contexts(1) for kind in NEGATIVE_KINDS]
    code = f"""
import json
from context_qa.negatives import NEGATIVE_KINDS, NegativeSampler
from squad_utils import read_examples
examples = read_examples({str(tmp_path / "data.txt")!r})
samplers = [NegativeSampler(examples, kind, seed=3) for kind in NEGATIVE_KINDS]
print(json.dumps([sampler.draw_contexts(1) for sampler in samplers]))
"""
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=True,
        )
        assert json.loads(there.stdout) == here


def test_random_negatives_reach_every_context():
    examples = articles(3, 3)
    sampler = NegativeSampler(examples, "random", seed=0)
    deep = next(i for i, example in enumerate(examples) if not example.is_answerable)
    drawn = {sampler.draw_contexts(epoch)[deep] for epoch in range(60)}
    asked = {e.context for e in examples if e.question == examples[deep].question}
    assert drawn == {example.context for example in examples} - asked


def test_same_article_negatives_fall_back_where_the_article_has_none():
    examples = articles()
    lonely = Example("lonely", "Alone here.", "Where?", ("here",), "Lonely")
    untitled = Example("untitled", "No title.", "What?", ("title",), None)
    examples += [lonely, untitled]
    drawn = NegativeSampler(examples, "same_article", seed=0).draw_contexts(0)
    article_of = {example.context: example.article for example in examples}
    for example, context in zip(examples[:-2], drawn[:-2], strict=True):
        assert article_of[context] == example.article
    assert drawn[-2] not in (None, lonely.context)
    assert drawn[-1] not in (None, untitled.context)
    with pytest.raises(UserError, match="JSONL with a column title"):
        NegativeSampler([untitled], "same_article")


def test_hard_negatives_are_near_the_question():
    near = [f"The violin of maker{i} has strings tuned in fifths, sample{i}." for i in range(12)]
    far = [f"Whale number{i} swims in cold northern waters all winter." for i in range(200)]
    asked = Example("v", "A violin has four strings tuned.", "How many strings tuned?", ("four",))
    examples = [asked] + [Example(c, c, "Which whale swims?", ()) for c in near + far]
    sampler = NegativeSampler(examples, "hard", seed=0)
    drawn = {sampler.draw_contexts(epoch)[0] for epoch in range(40)}
    assert drawn <= set(near)
    assert 5 <= len(drawn) <= 10


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_without_a_suitable_context_there_is_none(kind):
    contexts = ["Bo is four years old.", "Four it is, says everyone.", "Ann counts: four!"]
    examples = [Example(str(i), c, "How old?", ("four",), "A") for i, c in enumerate(contexts)]
    assert NegativeSampler(examples, kind).draw_contexts(0) == [None] * 3
    assert NegativeSampler(examples[:1], kind).draw_contexts(0) == [None]


def test_the_only_suitable_context_among_thousands_is_found():
    examples = [Example(str(i), f"four and {i}", "How many?", ("four",)) for i in range(3000)]
    examples.append(Example("fit", "five and nothing", "Which?", ("five",)))
    assert set(NegativeSampler(examples[-40:] + examples[:1]).draw_contexts(0)[:39]) == {
        "five and nothing"
    }


@pytest.mark.parametrize(
    ("answer", "context", "is_contained"),
    [
        ("Paris", "She left paris.", True),
        ("The Nile", "Along the Nile river", True),
        ("nile", "a Nile-side town", True),
        ("24", "won 24\u201310 at home", True),
        ("24", "won 24-10 at home", True),
        ("U.S.", "the US team", True),
        ("US", "the U.S. team", True),
        ("e-mail", "sent an email", True),
        ("caf\u00e9", "the Caf\u00e9, closed", True),
        ("Denver Broncos", "the Denver  (Broncos)", True),
        ("cat", "concatenate", False),
        (
            "\u5317\u4eac",
            "\u957f\u57ce\u5728\u5317\u4eac\u9644\u8fd1\u3002",
            True,
        ),  # Chinese: no blanks
        ("\u5317\u4eac", "\u5317\u65b9\u7684\u4eac\u5267", False),
        (
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            "\u0e2d\u0e22\u0e39\u0e48\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e2f",
            True,
        ),  # Thai
        ("24", "in 1924 or 240", False),
        ("Denver Broncos", "Denver and the Broncos", False),
    ],
)
def test_whether_a_context_contains_an_answer(answer, context, is_contained):
    examples = [Example("1", "own context", "q?", (answer,)), Example("2", context, "other?", ())]
    assert NegativeSampler(examples).draw_contexts(0)[0] == (None if is_contained else context)


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_a_question_is_not_asked_where_another_example_asks_it(kind):
    """Otherwise two rows would contradict each other about one context."""
    contexts = ("Ann has two cats.", "Bo has three dogs.", "Cy has none.")
    answers = (("two",), ("three",), ())
    examples = [
        Example(str(i), context, "How many animals?", answer, "A")
        for i, (context, answer) in enumerate(zip(contexts, answers, strict=True))
    ]
    other = Example("3", "Di has four.", "Who?", ("Di",), "A")
    drawn = NegativeSampler([*examples, other], kind).draw_contexts(0)
    assert drawn[:3] == ["Di has four."] * 3 and drawn[3] in contexts


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="'easy': choose from random, same_article, hard"):
        NegativeSampler(articles(), "easy")


@needs_squad
@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_negatives_on_real_data(kind):
    examples = read_examples(str(SQUAD / "dev-v1.1.json"))[::20]
    drawn = NegativeSampler(examples, kind, seed=0).draw_contexts(0)
    assert None not in drawn
    for example, context in zip(examples, drawn, strict=True):
        assert context != example.context
        plain = [a for a in example.answers if re.fullmatch(r"[^\W_]{4,}( [^\W_]{4,})*", a)]
        assert not any(contains(context, answer) for answer in plain)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat, a\tcat & an ANT!", "cat cat ant"),
        ("theatre another", "theatre another"),
        ("A", ""),
        ("?!.", ""),
        ("U.S.A.", "usa"),
        ("$1,000.50", "100050"),
        ("24\u201310", "24\u201310"),  # only ASCII punctuation is removed
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),
        ("\u00c9COLE", "\u00e9cole"),
        ("a\u2014b", "\u2014b"),  # articles end at any non-word character
        ("the-cat", "thecat"),  # punctuation is removed first
        ("one\u00a0two\u2003three", "one two three"),
        (NO_ANSWER, "i dont know"),
    ],
)
def test_normalize_answer(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("guess", "answers", "em", "f1"),
    [
        ("the Cat.", ("cat",), 1, 1),
        ("black cat", ("cat", "dog"), 0, 2 / 3),
        ("cat cat", ("cat",), 0, 2 / 3),
        ("cat cat dog", ("cat cat bird",), 0, 2 / 3),
        ("one two three four", ("three",), 0, 2 / 5),
        ("blue", ("red", "dark blue", "blue"), 1, 1),
        ("1,000", ("1000",), 1, 1),
        ("1000.0", ("1000",), 0, 0),
        ("\u00e9cole", ("\u00c9cole",), 1, 1),
        ("ecole", ("\u00c9cole",), 0, 0),
        (NO_ANSWER, (), 1, 1),
        ("i dont KNOW", (), 1, 1),
        ("", (), 1, 1),
        ("the", (), 1, 1),
        ("cat", (), 0, 0),
        ("I don't know the cat", (), 0, 0),
        (NO_ANSWER, ("cat",), 0, 0),
        (NO_ANSWER, ("i know",), 0, 0),  # an empty answer shares no words
        ("", ("cat",), 0, 0),
        ("the", ("The", "a"), 1, 1),  # all references are empty: the empty answer is correct
        ("cat", ("The",), 0, 0),
        ("the", ("The", "cat"), 0, 0),  # an empty reference is dropped if there is another
    ],
)
def test_exact_match_and_f1(guess, answers, em, f1):
    assert exact_match(guess, answers) == em
    assert f1_score(guess, answers) == pytest.approx(f1)
    assert exact_match(guess, list(answers)) == em


def plain_scores(guess: str, answers: list[str]) -> tuple[float, float]:
    """An independent implementation of the official definitions."""

    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if not ("!" <= c <= "~" and not c.isalnum()))
        pieces = re.findall(r"\w+|\W", kept)
        return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()

    def f1(ours: list[str], theirs: list[str]) -> float:
        if not ours or not theirs:
            return float(ours == theirs)
        left, common = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(ours), common / len(theirs)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    ours = [] if words(guess) == ["i", "dont", "know"] else words(guess)
    references = [words(answer) for answer in answers if words(answer)] or [[]]
    return float(ours in references), max(f1(ours, reference) for reference in references)


def test_scores_equal_an_independent_implementation():
    rng = random.Random(5)
    pieces = [
        "cat",
        "Cat,",
        "the",
        "a",
        "An",
        "dog",
        "24\u201310",
        "(dog)",
        "\u00e9",
        "'s",
        "-",
        "a-b",
    ]

    def phrase() -> str:
        return rng.choice([" ", "  ", "-"]).join(rng.choices(pieces, k=rng.randrange(5)))

    seen = set()
    for _ in range(800):
        guess = rng.choice([phrase(), phrase(), phrase(), NO_ANSWER])
        answers = [phrase() for _ in range(rng.randrange(4))]
        em, f1 = plain_scores(guess, answers)
        assert exact_match(guess, answers) == em
        assert f1_score(guess, answers) == pytest.approx(f1, abs=1e-12)
        seen.add((em, 0 < f1 < 1))
    assert seen == {(0.0, False), (0.0, True), (1.0, False)}


def test_raw_match():
    assert is_correct(" Denver BRONCOS\n", "Denver Broncos")
    assert not is_correct("The Denver Broncos", "Denver Broncos")
    assert not is_correct("Denver Broncos.", "Denver Broncos")
    assert is_correct("i don't know.", NO_ANSWER)
    assert not is_correct("", NO_ANSWER)


CURLY = ("I don’t know.", "I don‘t know", "I donʼt know.", "Ｉ don＇t know．", "I don\u2032t know!")
MARKED = ("¿I don´t know。", "I don't\u200bknow", "“I don't know”", "(I donꞌt know…)")


@pytest.mark.parametrize(
    "guess", [NO_ANSWER, "i dont know", "I don't know", " I DON'T KNOW", *CURLY, *MARKED]
)
def test_abstentions(guess):
    assert abstains(guess) and is_scored_as_empty(guess)
    assert exact_match(guess, []) == 1.0 and exact_match(guess, ["x"]) == 0.0


@pytest.mark.parametrize("guess", ["", " the ", "A.", "::::", "+"])
def test_empty_guesses_and_punctuation_are_scored_as_empty_but_are_not_abstentions(guess):
    """As the official script scores them; a right answer "A" is not an abstention."""
    assert is_scored_as_empty(guess) and not abstains(guess)
    assert exact_match(guess, []) == 1.0


@pytest.mark.parametrize(
    "guess",
    ["I know.", "don't know", "0", "I don't know him", "¿I don’t know him?", "4: I don't know"],
)
def test_guesses_that_are_not_abstentions(guess):
    assert not abstains(guess) and not is_scored_as_empty(guess)


SAME = [
    ("Zoé", "Zoe\u0301", "ZOE"),
    ("１９９８", "1998", "١٩٩٨", "१९९८"),
    ("co\u00adoperate", "cooperate", "co\u200boperate"),
    ("I don’t", "I don't", "I donʼt", "I don\u2032t"),
    ("1990–95", "1990-95", "1990\u2011 95".replace(" ", "")),
    ("−3", "-3"),
    ("ﬁve", "five"),
    ("Straße", "STRASSE"),
    ("a\u00a0b", "a b", "a\u3000b"),
    ("“x”", "„x“", "«x»", '"x"', "＂x＂", "〝x〞", "″x‶"),
    ("❤\ufe0f", "❤"),
    ("O'Neill", "O´Neill", "O’Neill", "OꞌNeill", "O＇Neill", "O‵Neill"),
    ("Hawai'i", "Hawaiʻi", "Hawai‘i"),
    ("1/2", "½", "1⁄2"),
    ("\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd", "\u05e9\u05dc\u05d5\u05dd"),  # Hebrew points
    ("\u0643\u0650\u062a\u064e\u0627\u0628", "\u0643\u062a\u0627\u0628"),  # Arabic ones
    ("\u1820\u180b", "\u1820"),
    ("x\u3164y", "x\u1160y", "xy"),
    ("ｶﾞ", "ガ", "カ\u3099"),
]


@pytest.mark.parametrize("texts", SAME, ids=str)
def test_folding_makes_one_form(texts):
    assert len({fold(text) for text in texts}) == 1
    assert fold(fold(texts[0])) == fold(texts[0])


DIFFERENT = [
    ("1998", "1999"),
    ("হিন্দি", "হন্দ"),
    ("कि", "का"),
    ("ab", "a b"),
    ("10⁵", "105"),
    ("H₂O", "H2O"),
    ("'x'", '"x"'),
    ("‘x’", "“x”"),
]


@pytest.mark.parametrize("texts", DIFFERENT, ids=str)
def test_folding_keeps_different_words_apart(texts):
    """Vowel signs of Indian scripts are not accents."""
    assert len({fold(text) for text in texts}) == len(texts)


def test_folding_gives_every_character_one_form():
    """Except superscripts, and those that NFKC turns into a space or two primes."""
    exceptions = set("\u00b4\u1ffd\u2033\u2036")
    for number in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        character = chr(number)
        folded = fold(character)
        assert fold(folded) == folded, hex(number)
        if decomposition := unicodedata.decomposition(character):
            assert fold(unicodedata.normalize("NFD", character)) == folded, hex(number)
            assert fold(unicodedata.normalize("NFC", character)) == folded, hex(number)
            if not decomposition.startswith(("<super>", "<sub>")) and character not in exceptions:
                assert fold(unicodedata.normalize("NFKC", character)) == folded, hex(number)


def test_folding_does_not_depend_on_the_order_of_marks():
    marks = "\u093c\u094d\u0301\u0327\u200d\u05b8"
    texts = ["क" + "".join(order) for order in itertools.permutations(marks)]
    assert len({fold(text.replace("\u200d", "")) for text in texts}) == 1
    assert all(fold(fold(text)) == fold(text) for text in texts)


def test_the_same_question_in_other_forms():
    context, question = "“Zoé” paid 10⁵ – in １９９８.", "Who’s Zoé?"
    other = unicodedata.normalize("NFD", context.replace("–", "-").replace("“Zoé”", '"ZOÉ"'))
    assert same_question(context, question) == same_question(other, "who's zoe\u0301?")
    assert same_question(context, question) != same_question(context.replace("⁵", "6"), question)


def test_folding_leaves_official_scores_alone():
    composed, decomposed = "Zoé", "Zoe\u0301"
    assert exact_match(composed, [decomposed]) == 0.0 == f1_score(composed, [decomposed])
    assert folded_answer(composed) == folded_answer(decomposed)
