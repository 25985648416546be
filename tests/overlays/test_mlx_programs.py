"""mlx-lm's own programs on the folder of an overlay, each in a process of its own, against the model that we load."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import ModelUnreadable, UnknownFormat
from places import DEMO
from processor_time import HANGS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx_lm.generate import generate_step

    from chuk_lazarus.introspection.moe import load_overlay, overlay_classes

PROMPT, TOKENS = "The history of ", 24
CHAT = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[-1]['content'] }}"}
OPTIONS: dict[str, dict[str, float]] = {"codes": {"bits": 2.25}, "ranks": {"target_ratio": 3}}
every_version = pytest.mark.parametrize("version", ["codes", pytest.param("ranks", marks=pytest.mark.long)])


def write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are the bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 has it; the others follow from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.encode(text := "naïve\n\0").ids == list(text.encode())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CHAT))


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an overlay in codes and one in ranks."""
    root = tmp_path_factory.mktemp("overlays")
    shutil.copytree(DEMO / "upcycled", root / "model")
    write_tokenizer(root / "model")
    for version, options in OPTIONS.items():
        MoECompressionService.compress(str(root / "model"), root / version, **options)  # type: ignore[arg-type]
    return root


def likeliest(folder: Path) -> str:
    """What the model that `load_overlay` gives goes on with."""
    model, _ = load_overlay(folder)
    steps = generate_step(mx.array(list(PROMPT.encode())), model, max_tokens=TOKENS)
    return bytes(int(token) for token, _ in steps).decode()


def program(name: str, folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", name, "--model", str(folder), "--trust-remote-code", *options]


def run(command: list[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@every_version
def test_generate(version: str, overlays: Path) -> None:
    options = ["--prompt", PROMPT, "--max-tokens", str(TOKENS), "--temp", "0", "--ignore-chat-template"]
    printed = run(program("generate", overlays / version, *options))
    assert printed.split("==========")[1].strip() == likeliest(overlays / version).strip()


@every_version
def test_chat(version: str, overlays: Path) -> None:
    options = ["--max-tokens", str(TOKENS), "--temp", "0"]
    printed = run(program("chat", overlays / version, *options), f"{PROMPT.rstrip()}\nq\n")
    assert f"{TOKENS} tokens" in printed


@every_version
def test_server(version: str, overlays: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = program("server", overlays / version, "--host", "127.0.0.1", "--port", str(port))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            wait_for(port, server)
            answer = ask(port, {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
        finally:
            server.terminate()
            server.communicate(timeout=HANGS)
    assert answer["choices"][0]["text"] == likeliest(overlays / version)


def wait_for(port: int, server: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + HANGS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)


def ask(port: int, request: dict[str, Any]) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    question = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with opener.open(question, timeout=HANGS) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


# What we ourselves do with the file that those programs execute


def test_our_commands_do_not_execute_it(overlays: Path, tmp_path: Path) -> None:
    shutil.copytree(overlays / "codes", tmp_path / "overlay")
    (tmp_path / "overlay/overlay_model.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nraise SystemExit(7)"
    )
    expected = likeliest(overlays / "codes")
    assert likeliest(tmp_path / "overlay") == expected
    MoECompressionService.export(tmp_path / "overlay", tmp_path / "export")
    assert not (tmp_path / "executed").exists()


def test_an_export_has_none_of_it(overlays: Path, tmp_path: Path) -> None:
    MoECompressionService.export(overlays / "codes", tmp_path / "export")
    assert not (tmp_path / "export/overlay_model.py").exists()
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config == json.loads((overlays / "model/config.json").read_text())


def test_code_of_the_model_is_left_to_the_model(overlays: Path, tmp_path: Path) -> None:
    """A model that names a file of its own is no mlx-lm model that we know; its file is not taken for ours."""
    shutil.copytree(overlays / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"model_file": "own.py"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/own.py").write_text("raise SystemExit(7)")
    MoECompressionService.compress(str(tmp_path / "model"), tmp_path / "overlay", bits=3)
    with pytest.raises(ModelUnreadable, match=r"custom module \('own.py'\)"):
        load_overlay(tmp_path / "overlay")
    MoECompressionService.export(tmp_path / "overlay", tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text()) == config
    assert (tmp_path / "export/own.py").read_text() == "raise SystemExit(7)"


def test_classes_of_a_folder_that_has_none(overlays: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match="no overlay"):
        overlay_classes(overlays / "model")
    shutil.copytree(overlays / "codes", tmp_path / "overlay")
    config = json.loads((tmp_path / "overlay/config.json").read_text()) | {"model_type": "unheard_of"}
    (tmp_path / "overlay/config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownFormat, match="no model class for model_type unheard_of"):
        overlay_classes(tmp_path / "overlay")
