"""Arguments from a command line and from files, and errors as one sentence with an exit code."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scripts import CLOSED, run_forked

from trainer.command_line import one_sentence, parse_arguments, read_argument_file, run_program
from trainer.devices import bfloat16_slowdown, has_accelerator, is_bfloat16_native
from trainer.run_arguments import ARGUMENT_GROUPS, FORMER_NAMES, check_arguments, run_defaults


ROOT = Path(__file__).parents[1]


@dataclass
class Some:
    rate: float = 0.5
    count: int | None = 3
    name: str | None = None
    flag: bool = False
    shown: bool = True
    files: list[str] = field(default_factory=lambda: ["a"])
    numbers: list[int] | None = None
    options: dict | str | None = None
    reports: None | str | list[str] = None
    kind: str = field(default="x", metadata={"choices": ["x", "y"]})


@dataclass
class Other:
    further: str = "z"


def parse(*argv, **kwargs):
    return parse_arguments((Some, Other), [str(word) for word in argv], **kwargs)


def written(folder, values, name="arguments.json"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_the_command_line_says_which_arguments_were_named():
    (some, other), named = parse("--rate", "0.5", "--flag", "--no_shown", "--files", "b", "c", "--further=w")
    assert (some.rate, some.flag, some.shown, some.files, some.count) == (0.5, True, False, ["b", "c"], 3)
    assert other.further == "w"
    assert named == {"rate": 0.5, "flag": True, "shown": False, "files": ["b", "c"], "further": "w"}


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("count", None, 3),
        ("rate", None, 0.5),
        ("rate", 1, 1.0),
        ("rate", "1e-4", 1e-4),
        ("rate", -2.5, -2.5),
        ("flag", True, True),
        ("shown", False, False),
        ("flag", "yes", True),
        ("name", "- a = b", "- a = b"),
        ("name", "", ""),
        ("name", True, "True"),
        ("files", "one", ["one"]),
        ("files", ["one", "--two"], ["one", "--two"]),
        ("files", [], []),
        ("numbers", [3, 1], [3, 1]),
        ("numbers", 3, [3]),
        ("numbers", ["3"], [3]),
        ("options", {"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
        ("options", {}, {}),
        ("reports", [], []),
        ("reports", ["a", "b"], ["a", "b"]),
        ("reports", "none", "none"),
    ],
)
def test_a_file_gives_each_kind_of_value(tmp_path, name, given, read):
    (some, _), named = parse(written(tmp_path, {name: given}))
    assert getattr(some, name) == read and type(getattr(some, name)) is type(read)
    assert set(named) == (set() if given is None else {name})


def test_yaml_gives_what_json_gives_and_the_command_line_wins(tmp_path):
    path = written(tmp_path, "rate: 1e-4\nfiles: [b]\nname: null\noptions: {a: 1}\nshown: no\n", "arguments.yml")
    (some, _), named = parse(path, "--rate", "2", "--kind", "y")
    assert (some.rate, some.files, some.name, some.options, some.shown, some.kind) == (
        2.0,
        ["b"],
        None,
        {"a": 1},
        False,
        "y",
    )
    assert set(named) == {"rate", "files", "options", "shown", "kind"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"counts": 1}, "no argument `counts`. The closest is `count`."),
        ({"count": "x"}, "`count`: .*invalid int value: 'x'"),
        ({"count": 1.5}, "`count`: .*invalid int value: '1.5'"),
        ({"count": {"a": 1}}, "`count`: a dictionary is given"),
        ({"count": [1, 2]}, "`count`: a list is given"),
        ({"numbers": [[1]]}, "is in a list"),
        ({"numbers": [None]}, "is in a list"),
        ({"flag": "maybe"}, "Truthy value expected"),
        ({"kind": "z"}, "invalid choice: 'z'"),
        ([], "contains no named arguments"),
        ("3", "contains no named arguments"),
        ("", "cannot be parsed"),
        ('{"rate": 1,}', "cannot be parsed"),
        ('{"rate": 1, "rate": 2}', "'rate' appears twice"),
        ("[" * 100_000, "nested too deeply|cannot be parsed"),
    ],
)
def test_a_file_that_is_wrong_ends_in_one_sentence_that_names_it(tmp_path, values, sentence):
    path = written(tmp_path, values)
    with pytest.raises(ValueError, match=sentence) as caught:
        parse(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_files_that_cannot_be_read_are_reported(tmp_path):
    for content, name in ((b"\xff\xfe\x00", "a.json"), (b"a: [", "a.yaml")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be parsed"):
            read_argument_file(tmp_path / name)
    with pytest.raises(ValueError, match="There is no file .*none.json"):
        parse(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="folder.json cannot be read"):
        parse(tmp_path / "folder.json")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--counts", "1"], "no argument `--counts`. The closest is `--count`."),
        (["--rat", "1"], "no argument `--rat`"),
        (["--count", "x"], "invalid int value: 'x'"),
        (["--count"], "expected one argument"),
        (["word"], "'word' belongs to no argument|no argument `word`"),
    ],
)
def test_a_command_line_that_is_wrong_ends_in_a_one_sentence_error(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(*argv)


@pytest.mark.parametrize("former", ["--old_rate 2", "--old-rate 2", "--old_rate=2", "file"])
def test_a_former_name_works_and_warns(tmp_path, former):
    argv = [written(tmp_path, {"old_rate": 2})] if former == "file" else former.split()
    with pytest.warns(FutureWarning, match="old_rate` is called `(--)?rate` now"):
        (some, _), named = parse(*argv, former_names={"old_rate": "rate"})
    assert some.rate == 2 and named == {"rate": 2.0}


def test_defaults_may_depend_on_what_was_named_and_never_win():
    def defaults(named):
        return {"rate": 9.0, "count": 7 if "name" in named else 8}

    (some, _), named = parse("--rate", "1", "--name", "n", defaults=defaults)
    assert (some.rate, some.count) == (1.0, 7) and set(named) == {"rate", "name"}


# ---- The border ----


def run(folder, body, **streams):
    """Exit code and standard error of a program whose `main` is `body`."""
    names = {"sys": sys, "os": os}
    lines = textwrap.indent(textwrap.dedent(body), "    ").strip()
    exec(f"def main():\n    {lines}", names)
    return run_forked(run_program, names["main"], "program", folder=folder, **streams)


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("raise ValueError('a is 1, but 2 is needed.')", 2, "program: a is 1, but 2 is needed.\n"),
        ("open('/none/x')", 1, "program: /none/x: No such file or directory.\n"),
        ("raise FloatingPointError('The loss became nan.')", 1, "program: The loss became nan.\n"),
        ("raise KeyboardInterrupt", 130, "program: Interrupted.\n"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_sentence_and_an_exit_code(tmp_path, body, code, sentence):
    assert run(tmp_path, body) == (code, sentence)


def test_a_traceback_is_shown_on_demand_and_for_faults_of_the_program(tmp_path, monkeypatch):
    assert "Traceback" in run(tmp_path, "raise KeyError('x')")[1]
    monkeypatch.setenv("SEP_MLDC_DEBUG", "1")
    assert "Traceback" in run(tmp_path, "raise ValueError('x')")[1]
    assert one_sentence(KeyError("x")) is None
    assert "Lower `per_device_train_batch_size`" in one_sentence(MemoryError())


WRITES = """
    with open({path!r}, "w") as file:
        for _ in range(20_000):
            print("printed")
            print("warned", file=sys.stderr)
        os.write(1, b"from a library") if {closed!r} else None
        file.write("written")
"""


@pytest.mark.parametrize(
    "streams",
    [
        {"stdout": CLOSED},
        {"stdout": CLOSED, "stderr": CLOSED},
        {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED},
        {"stdout": "/dev/full"},
        {"stderr": "/dev/full"},
    ],
    ids=str,
)
def test_a_program_whose_output_nobody_can_read_continues(tmp_path, streams):
    """Closed streams and a full disk: printed text is lost, but never ends up in another file."""
    body = WRITES.format(path=str(tmp_path / "result"), closed=streams == {"stdout": CLOSED})
    code, message = run(tmp_path, body, **streams)
    assert code == 0, message
    assert (tmp_path / "result").read_text() == "written"


def test_a_program_continues_when_the_reader_of_its_output_has_gone(tmp_path):
    """In an interpreter of its own, which closes its streams at the end."""
    body = textwrap.indent(textwrap.dedent(WRITES), "    ").format(path=str(tmp_path / "result"), closed=False)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom trainer.command_line import run_program\n"
        f"def main():{body}\nrun_program(main, 'program')\n"
    )
    command = ["sh", "-c", '"$0" "$1" | head -c 1', sys.executable, str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "result").read_text() == "written"


# ---- Arguments of run_mldc.py ----


def settings_of(*argv):
    words = ["--model_name_or_path", "x", "--do_train", "--report_to", "none", *map(str, argv)]
    return parse_arguments(ARGUMENT_GROUPS, words, FORMER_NAMES, run_defaults)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--max_train_samples", 0], "`--max_train_samples` is 0, but it must be an integer of at least 1"),
        (["--max_eval_samples", -3], "`--max_eval_samples` is -3"),
        (["--max_length", 0], "`--max_length` is 0"),
        (["--encoder_max_length", -1], "`--encoder_max_length` is -1"),
        (["--freeze_layers", -1], "`--freeze_layers` is -1"),
        (["--num_examples", -1], "`--num_examples` is -1"),
        (["--preprocessing_num_workers", 0], "`--preprocessing_num_workers` is 0"),
        (["--num_lexical_features", 0], "`--num_lexical_features` is 0"),
        (["--classifier_dropout", "nan"], "`--classifier_dropout` is nan"),
        (["--classifier_dropout", 1], "`--classifier_dropout` is 1.0"),
        (["--backbone_dropout", "inf"], "`--backbone_dropout` is inf"),
        (["--threshold_objective", "f2"], "f2"),
        (["--threshold_objective", "precision:nan"], "precision"),
        (["--score_calibration", "plat"], "plat"),
        (["--early_stopping_patience", 2], "there is no evaluation during training"),
        (["--early_stopping_patience", 0, "--eval_strategy", "epoch"], "`--early_stopping_patience` is 0"),
        (["--do_train", "False"], "There is nothing to do"),
    ],
)
def test_values_out_of_range_are_reported_before_anything_is_read(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_arguments(*settings_of(*argv).groups)


def test_former_names_of_the_first_version_work():
    with pytest.warns(FutureWarning):
        (_, _, labels, _, lexical, *_), _ = settings_of("--pseudo_samples_file", "p", "--lexical_features", 7)
    assert labels.pseudo_documents_file == "p" and lexical.num_lexical_features == 7


def test_the_device_and_its_precision_are_found():
    args = settings_of().groups[-1]
    assert args.use_cpu is not has_accelerator()
    assert args.bf16 is is_bfloat16_native() and args.logging_steps == 0.02
    assert settings_of("--bf16", "False", "--logging_steps", 5).groups[-1].bf16 is False
    assert settings_of("--bf16").groups[-1].bf16 is True  # on a machine without GPU too
    assert 0 < bfloat16_slowdown(size=64, repeats=2) < 1e6


def test_early_stopping_alone_brings_what_it_needs():
    args = settings_of("--early_stopping_patience", 2, "--eval_strategy", "epoch").groups[-1]
    assert args.save_strategy == "epoch" and args.load_best_model_at_end
    args = settings_of("--early_stopping_patience", 2, "--eval_strategy", "epoch", "--save_strategy", "no").groups[-1]
    assert args.save_strategy == "no" and not args.load_best_model_at_end


def test_a_list_in_an_error_stays_a_list():
    assert one_sentence(ValueError("Two  rows:\n- a\n-  b")) == "Two rows:\n- a\n- b"
    assert one_sentence(ValueError("Two\nlines.")) == "Two lines."
