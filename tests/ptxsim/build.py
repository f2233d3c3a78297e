"""Builds CUDA sources into CPU libraries and programs on top of the simulator.

nvcc compiles a source to a host object and PTX; the PTX is translated to C++ and compiled with the host compiler; both
objects are linked with ``libptxsim.so``, which is the simulator and stands in for the CUDA runtime. Everything goes to
``build/ptxsim`` of the repository (or ``$PTXSIM_CACHE``) and is found there again by its content: the compiler versions
and flags, the simulator's own sources, and every file that the source includes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .translate import translate

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
# Half conversions and fused multiply-add are instructions; translated code relies on wrap-around and on type punning.
CXXFLAGS = ["-std=c++20", "-march=x86-64-v3", "-ffp-contract=off", "-fwrapv", "-fno-strict-aliasing", "-fPIC"]
MAX_COMPILES = 2
"""Compilers that run at the same time."""


class BuildError(RuntimeError):
    """A compiler, the assembler or the linker failed; holds the command and its output."""


def unavailable() -> str | None:
    """Why nothing can be built and run here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if platform.machine() != "x86_64":
        return f"the simulator runs on x86-64 only, this is {platform.machine()}"
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    missing = {"avx2", "fma", "f16c", "bmi2"} - set(flags.group(1).split() if flags else ())
    return f"the CPU lacks {', '.join(sorted(missing))}" if missing else None


def cache_directory() -> Path:
    """``$PTXSIM_CACHE``, or build/ptxsim under the repository root."""
    return Path(os.environ.get("PTXSIM_CACHE", HERE.parents[1] / "build" / "ptxsim")).resolve()


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Standard output of a command; raises BuildError with all output when it fails."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if result.returncode:
        raise BuildError(f"{shlex.join(str(word) for word in command)}\n{(result.stdout + result.stderr)[:6000]}")
    return result.stdout


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits that identify the parts."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


@functools.cache
def _file_digest(path: str, _modified: int, _size: int) -> str:
    return digest(Path(path).read_bytes())


def _content_digest(settings: str, files: Iterable[str]) -> str | None:
    """Identifies the settings and the contents of the files; None if a file is missing."""
    parts = [settings]
    for file in files:
        try:
            stat = os.stat(file)
        except OSError:
            return None
        parts += [file, _file_digest(file, stat.st_mtime_ns, stat.st_size)]
    return digest(*parts)


@functools.cache
def _toolchain() -> str:
    """Identifies the compilers and the parts of the simulator that shape an object file."""
    own = sorted([*HERE.glob("*.hpp"), *HERE.glob("translate/*.py"), HERE / "ptxparse.py", Path(__file__)])
    return digest(run(["nvcc", "--version"]), run([CXX, "--version"]), *CXXFLAGS, *(path.read_bytes() for path in own))


@functools.cache
def cuda_include() -> Path:
    """The directory of cuda_runtime.h."""
    command = ["nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null"]
    dryrun = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dryrun)
    if top is None:
        raise BuildError(f"{shlex.join(command)} does not name the toolkit's directory:\n{dryrun}")
    return Path(os.path.realpath(top.group(1))) / "include"


def runtime_library() -> Path:
    """libptxsim.so, built on first use."""
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.hpp")])
    key = digest(run([CXX, "--version"]), *CXXFLAGS, *(path.name + path.read_text() for path in sources))
    library = cache_directory() / "runtime" / key / "libptxsim.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:

        def compile_part(source: Path) -> Path:
            built = Path(temporary) / f"{source.stem}.o"
            opt = ["-O3"] if source.stem in ("matrix", "wgmma") else ["-O2", "-frounding-math"]
            run([CXX, *CXXFLAGS, "-Wall", "-Wextra", *opt, "-I", cuda_include(), "-c", source, "-o", built])
            return built

        with ThreadPoolExecutor(MAX_COMPILES) as pool:
            objects = list(pool.map(compile_part, [path for path in sources if path.suffix == ".cpp"]))
        # Versioned symbols: a real libcudart in the process (a CUDA build of torch loads one) cannot take their place.
        shared = ["-shared", "-Wl,-soname,libptxsim.so", "-Wl,--default-symver"]
        run([CXX, *shared, "-o", Path(temporary) / "libptxsim.so", *objects, "-lpthread"])
        os.replace(Path(temporary) / "libptxsim.so", library)
    return library


def compile_source(
    source: Path,
    arch: str,
    *,
    includes: Sequence[Path] = (),
    nvcc_flags: Sequence[str] = (),
    opt: str = "-O1",
    ptxas: bool = False,
) -> list[Path]:
    """The object files of a ``.cu`` (host and device) or ``.ptx`` (device only), from the cache if nothing changed.

    ``arch`` is the number after ``compute_``, such as "80" or "90a"; ``opt`` is the optimisation of the translated
    code. ``ptxas`` also assembles the PTX: nvcc stops at PTX here, and invalid inline assembly shows only then.
    """
    source = Path(source).resolve()
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-cudart", "none", "-Xcompiler", "-fPIC"]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}", *(f"-I{path}" for path in includes), *nvcc_flags]
    settings = digest(str(source), arch, opt, str(ptxas), *flags, _toolchain())
    manifest = cache_directory() / "sources" / f"{source.stem}-{settings}.json"
    if manifest.exists():
        recorded = json.loads(manifest.read_text())
        directory = Path(recorded["directory"])
        key = _content_digest(settings, recorded["files"])
        if key is not None and directory.name.endswith(key) and directory.exists():
            return [directory / name for name in recorded["objects"]]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    entry = f"ptxsim_module_{settings}"
    with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary_name:
        temporary = Path(temporary_name)
        objects = []
        if source.suffix == ".ptx":
            ptx, files = source, [str(source)]
        else:
            # The host code registers its kernels and variables with the translation of its own device code.
            rename = f"-Xcompiler=-D__cudaRegisterFatBinary={entry}"
            objects.append(f"{source.stem}.host.o")
            keep = temporary / "keep"
            keep.mkdir()
            dependencies = temporary / "dependencies"
            outputs: list[str | Path] = [
                "-o",
                temporary / objects[0],
                "-MD",
                "-MF",
                dependencies,
                "-keep",
                "-keep-dir",
                keep,
            ]
            run(["nvcc", *flags, rename, "-c", source, *outputs])
            ptx = next(keep.glob("*.ptx"))
            included = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1]
            files = sorted({str(Path(word).resolve()) for word in shlex.split(included)} | {str(source)})
        if ptxas:
            run(["ptxas", f"-arch=sm_{arch}", ptx, "-o", temporary / "kernels.cubin"])
        content = _content_digest(settings, files)
        directory = cache_directory() / "objects" / f"{source.stem}-{content}"
        text = ptx.read_text()
        translated = temporary / f"{source.stem}.sim.cpp"
        translated.write_text(translate(text, str(directory / f"{source.stem}.ptx"), entry))
        objects.append(f"{source.stem}.sim.o")
        run([CXX, *CXXFLAGS, opt, "-w", "-I", HERE, "-c", translated, "-o", temporary / objects[-1]])
        directory.mkdir(parents=True, exist_ok=True)
        (temporary / f"{source.stem}.ptx").write_text(text)
        for name in [*objects, f"{source.stem}.ptx", translated.name]:
            os.replace(temporary / name, directory / name)
        record = temporary / "manifest"
        record.write_text(json.dumps({"directory": str(directory), "objects": objects, "files": files}))
        os.replace(record, manifest)
    return [directory / name for name in objects]


def compile_sources(
    sources: Sequence[Path],
    arch: str,
    *,
    includes: Sequence[Path] = (),
    nvcc_flags: Sequence[str] = (),
    opt: str = "-O1",
    ptxas: bool = False,
) -> list[Path]:
    """The object files of several sources, two at a time; arguments as compile_source."""

    def compile_one(source: Path) -> list[Path]:
        return compile_source(source, arch, includes=includes, nvcc_flags=nvcc_flags, opt=opt, ptxas=ptxas)

    with ThreadPoolExecutor(MAX_COMPILES) as pool:
        return [built for group in pool.map(compile_one, sources) for built in group]


def _link(target: Path, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """Links objects and the simulator into target, unless it is there and made of the same contents."""
    runtime = runtime_library()
    command = [CXX, *(str(path) for path in objects), *flags, str(runtime), f"-Wl,-rpath,{runtime.parent}", "-lpthread"]
    stamp = target.with_name(target.name + ".key")
    key = _content_digest(digest(*command), [str(path) for path in objects])
    if key is not None and target.exists() and stamp.exists() and stamp.read_text() == key:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # the old file may be loaded in some process
        run([*command, "-o", Path(temporary) / target.name])
        os.replace(Path(temporary) / target.name, target)
        (Path(temporary) / "key").write_text(key or "")
        os.replace(Path(temporary) / "key", stamp)
    return target


def build_library(
    sources: Sequence[Path],
    arch: str,
    out: Path,
    *,
    name: str,
    includes: Sequence[Path] = (),
    nvcc_flags: Sequence[str] = (),
    objects: Sequence[Path] = (),
    link_flags: Sequence[str] = (),
    opt: str = "-O1",
    ptxas: bool = False,
) -> Path:
    """Compiles ``.cu`` and ``.ptx`` sources and links them, with further object files, into ``out/lib<name>.so``.

    Sources of another architecture go in as ``objects=compile_sources(others, "90a")``. The sources are compiled
    separately, without relocatable device code: a kernel can only use device functions and variables of its own
    source, and variables of the same name in several sources are different variables.
    """
    built = compile_sources(sources, arch, includes=includes, nvcc_flags=nvcc_flags, opt=opt, ptxas=ptxas)
    return _link(Path(out).resolve() / f"lib{name}.so", [*built, *objects], ["-shared", *link_flags])


def build_program(source: Path, arch: str, out: Path, *, includes: Sequence[Path] = (), opt: str = "-O1") -> Path:
    """Compiles a ``.cu`` with a main function into the program ``out/<stem of source>``."""
    built = compile_source(source, arch, includes=includes, opt=opt)
    return _link(Path(out).resolve() / Path(source).stem, built, [])
