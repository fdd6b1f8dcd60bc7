"""Each command refuses wrong flags with exit code 2 and one line that names them."""

import pytest

from distill.cli.main import main
from distill.errors import InputError


def test_distill_without_arguments_lists_the_commands(distill):
  shown = distill().stdout
  for name in ("train", "init", "score", "generate", "compare", "export", "merge", "inspect"):
    assert f"\n  {name} " in shown


def test_the_error_for_an_unknown_command_suggests_the_nearest_command(capsys):
  assert main(["scroe"]) == 2
  assert "did you mean score?" in capsys.readouterr().err


def test_the_debug_flag_lets_an_input_error_through_with_its_traceback():
  with pytest.raises(InputError, match="nowhere"):
    main(["inspect", "nowhere", "--debug"])


@pytest.mark.parametrize(
  "arguments, says",
  [
    (["score"], ["--model, --out, --tokens", "missing"]),
    (["score", "--modle=x"], ["modle", "model"]),
    (["score", "--model=x", "--tokens=x", "--out=x", "--dtype=float64"], ["--dtype=float64", "float32"]),
    (["score", "stray", "--model=x", "--tokens=x", "--out=x"], ["'stray'", "--flag=value"]),
    (["score", "--model=x", "--tokens=x", "--out=x", "--hidden=last"], ["--hidden=last", "such as 0,2"]),
    (["score", "--model=x", "--tokens=x", "--out=x", "--adapters=y", "--adapter_stack=z"], ["--adapter_stack", "both"]),
    (["generate", "--model=x"], ["--prompt", "missing"]),
    (["generate", "--model=x", "--prompt=a", "--max_tokens=0"], ["--max_tokens=0"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=hot"], ["--temperature=hot"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=nan"], ["temperature=nan"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=-1"], ["temperature=-1"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=1", "--top_k=-2"], ["top_k=-2"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=1", "--top_p=0"], ["top_p=0"]),
    (["generate", "--model=x", "--prompt=a", "--top_k=5"], ["--top_k", "--temperature"]),
    (["generate", "--model=nowhere", "--prompt=a"], ["nowhere/config.json", "no such file"]),
    (["export", "--out=x"], ["--model", "--workdir"]),
    (["export", "--out=x", "--model=a", "--workdir=b"], ["--model", "--workdir"]),
    (["export", "--out=x", "--model=a", "--format=gguf"], ["--format=gguf", "hf"]),
    (["export", "--out=x", "--workdir=nowhere"], ["nowhere/student", "the run has not finished"]),
    (["init", "--teacher=x"], ["--calibration, --out, --student", "missing"]),
    (
      ["init", "--teacher=x", "--student=x", "--calibration=x", "--out=x", "--layers_from=0,x"],
      ["--layers_from=0,x", "importance"],
    ),
    (["inspect"], ["DIR", "missing"]),
    (["inspect", "nowhere"], ["nowhere", "no such directory"]),
    (["merge", "--model=x", "--out=x"], ["--adapters and --adapter_stack", "neither"]),
    (["merge", "--model=x", "--out=x", "--adapters=y", "--rank=2"], ["--format=adapter"]),
    (["compare", "--student=a", "--teacher=b"], ["--config, --out", "missing"]),
    (["compare", "--student=a", "--teacher=b", "--out=c", "--config=gone.py"], ["gone.py", "no such file"]),
    (["train", "--config=gone.py", "--workdir=x"], ["gone.py", "no such file"]),
    (["train", "--config=gone.py", "--workdir=x", "--config.seed"], ["--config.seed", "VALUE"]),
  ],
  ids=" ".join,
)
def test_the_error_for_wrong_flags_or_arguments_names_them(refused, arguments, says):
  refused(*arguments, says=says)
