"""Builds quantlab._core: a table of source groups, each with its own compiler flags and a probe; prints what was found.

Environment: CC chooses the compiler; QL_CUDA=0 leaves CUDA out; QL_WERROR=1 makes warnings errors;
QL_SANITIZE=1 builds with AddressSanitizer and UBSan.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Group -> its sources, its flags, and a probe that must compile with them. Nothing is built with -march=native: what is
# not in an ISA group stays at the x86-64 baseline. A group without sources is reported and left out.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
BASELINE = ["csrc/*.c", "csrc/core/*.c", "csrc/ops/*.c", "csrc/quant/*.c", "csrc/model/*.c", "csrc/python/*.c"]
BASELINE_PROBE = "#include <Python.h>\n#include <omp.h>\nint f(void) { return omp_get_max_threads(); }\n"
INTRINSICS = "#include <immintrin.h>\n"
GROUPS = {
    "baseline": (BASELINE, [], BASELINE_PROBE),
    "avx2": (["csrc/x86/*_avx2.c"], AVX2, INTRINSICS + "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n"),
    "avx512": (["csrc/x86/*_avx512.c"], AVX512, INTRINSICS + "__m512 f(__m512 a) { return _mm512_add_ps(a, a); }\n"),
    "amx": (["csrc/x86/*_amx.c"], AMX, INTRINSICS + "void f(void) { _tile_dpbf16ps(0, 1, 2); }\n"),
}

# -ffp-contract=off: a fused multiply-add appears only where a kernel asks for it, so results do not depend on flags.
# -fstack-clash-protection: a task keeps up to half a MiB on the stack; in a thread with less it must not step over the
# guard page.
COMMON = ["-std=c11", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
          "-fstack-clash-protection", "-Wall", "-Wextra", "-Wpedantic"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


def env_set(name):
    return os.environ.get(name) == "1"


def sources(patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def stop(message):
    sys.exit(f"quantlab: {message}")


def find_nvcc():
    """nvcc of CUDA_HOME, of PATH, or of the pip packages; None where there is none."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if "CUDA_HOME" in os.environ else []
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    places += [Path(folder) / "nvidia" / "cuda_nvcc" / "bin" / "nvcc" for folder in sys.path]
    return next((str(place) for place in places if place.is_file()), None)


def cuda_report():
    if os.environ.get("QL_CUDA") == "0":
        return "left out (QL_CUDA=0)"
    nvcc = find_nvcc()
    found = f"nvcc is {nvcc}" if nvcc else "no nvcc in CUDA_HOME, PATH or the pip packages"
    return f"not built: no kernels exist yet ({found})"


class Compiler:
    """The C compiler with the include folders of Python and NumPy (as system folders: not ours to warn about)."""

    def __init__(self, command, include_dirs):
        self.command = list(takewhile(lambda word: not word.startswith("-"), command)) or ["cc"]
        self.include = [f"-isystem{path}" for path in include_dirs]
        if shutil.which(self.command[0]) is None:
            stop(f"no C compiler: {self.command[0]!r} is not on PATH. Install gcc (apt-get install gcc) or set CC.")
        headers = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.h")))
        self.headers = hashlib.sha256(headers).hexdigest()

    def version(self):
        words = subprocess.run([*self.command, "-dumpfullversion"], capture_output=True, text=True)
        if words.returncode != 0:  # clang
            words = subprocess.run([*self.command, "-dumpversion"], capture_output=True, text=True)
        return f"{Path(self.command[-1]).name} {words.stdout.strip() or 'unknown'}"

    def probe(self, flags, text):
        """None where `text` compiles, else what the compiler said."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text(text)
            command = [*self.command, "-fopenmp", *flags, *self.include, "-c", source, "-o", source.with_suffix(".o")]
            result = subprocess.run(command, capture_output=True, text=True)
        return None if result.returncode == 0 else result.stderr

    def compile(self, source, flags, folder):
        """The object of `source`. Its name holds a hash of command, source and all headers: a change rebuilds it."""
        command = [*self.command, *flags, *self.include, "-c", source]
        key = hashlib.sha256("\0".join([*command, self.headers]).encode() + (ROOT / source).read_bytes()).hexdigest()
        target = folder / f"{source.replace('/', '_')}.{key[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            if subprocess.run([*command, "-o", str(partial)], cwd=ROOT).returncode != 0:
                stop(f"{source} did not compile; the compiler's message is above.")
            partial.rename(target)
        return str(target)


class BuildCore(build_ext):
    """Compiles each group with its flags, in parallel, and links one shared object."""

    def build_extension(self, extension):
        include_dirs = [*self.compiler.include_dirs, *extension.include_dirs]
        compiler = Compiler(self.compiler.compiler_so, include_dirs)
        built, report = self.choose_groups(compiler)
        version = compiler.version()
        defines = [f"-DQL_BUILT_{group.upper()}" for group in built] + [f'-DQL_COMPILER="{version}"']
        flags = [*COMMON, *["-Werror"] * env_set("QL_WERROR"), *SANITIZE * env_set("QL_SANITIZE")]
        jobs = []
        for group in built:
            patterns, group_flags, _ = GROUPS[group]
            jobs += [(source, [*flags, *defines, *group_flags]) for source in sources(patterns)]
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda job: compiler.compile(*job, folder), jobs))
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*compiler.command, "-shared", "-fopenmp", *SANITIZE * env_set("QL_SANITIZE"), *objects]
        subprocess.run([*link, "-lm", "-lpthread", "-o", str(output)], check=True)
        print(f"quantlab: compiler {version}\n" + "\n".join(f"quantlab: {line}" for line in report))

    @staticmethod
    def choose_groups(compiler):
        """The groups to build, and a line for each group that says why or why not."""
        trouble = compiler.probe([], BASELINE_PROBE)
        if trouble is not None:
            stop(f"a first C file did not compile. Are Python's headers (python3-dev) and OpenMP there?\n{trouble}")
        built, report = [], []
        for group, (patterns, flags, probe) in GROUPS.items():
            count = len(sources(patterns))
            if count == 0:
                report.append(f"{group}: no kernels exist yet")
            elif compiler.probe(flags, probe) is not None:
                report.append(f"{group}: left out, this compiler does not know {' '.join(flags)}")
            else:
                built.append(group)
                report.append(f"{group}: built, {count} files")
        return built, [*report, f"cuda: {cuda_report()}"]


if sys.platform != "linux":
    stop("only Linux is supported for now")

setup(
    ext_modules=[Extension("quantlab._core", sources=[], include_dirs=[numpy.get_include()])],
    cmdclass={"build_ext": BuildCore},
)
