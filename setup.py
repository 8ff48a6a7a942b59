"""Builds quantlab._core: a table of source groups, each with its own compiler flags, and a probe for each group.

Environment: QL_CUDA=0 builds without CUDA; QL_SANITIZE=1 builds with ASan and UBSan; QL_WERROR=1 makes warnings errors.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# group -> (flags, sources). Everything outside an ISA group stays at the x86-64 baseline; nothing is -march=native.
BASELINE = ["csrc/core", "csrc/ops", "csrc/quant", "csrc/model", "csrc/python"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    "amx": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
PROBES = {
    "avx2": "#include <immintrin.h>\n__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n",
    "avx512": "#include <immintrin.h>\n__m512 f(__m512 a) { return _mm512_fmadd_ps(a, a, a); }\n",
    "amx": "#include <immintrin.h>\nvoid f(void) { _tile_dpbf16ps(0, 1, 2); }\n",
}
# -ffp-contract=off: a fused multiply-add appears only where a kernel asks for it, so scalar results do not depend on flags.
COMMON = ["-std=c11", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
          "-Wall", "-Wextra", "-Wpedantic"]  # fmt: skip


def sources(folder):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.c"))


def isa_sources(isa):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/x86").glob(f"*_{isa}.c"))


class BuildCore(build_ext):
    """Compiles each group with its flags, in parallel, and links one shared object."""

    def build_extension(self, extension):
        compiler = self.compiler.compiler_so[0] if self.compiler.compiler_so else "cc"
        flags = COMMON + ["-Werror"] * (os.environ.get("QL_WERROR") == "1")
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
        flags += sanitize * (os.environ.get("QL_SANITIZE") == "1")
        isa_built = [isa for isa in ISA_FLAGS if isa_sources(isa) and self.probe(compiler, isa)]
        include = [f"-isystem{path}" for path in (*self.compiler.include_dirs, *extension.include_dirs)]  # not ours to warn about
        defines = [f"-DQL_BUILT_{isa.upper()}" for isa in isa_built]
        defines.append(f'-DQL_COMPILER="{compiler} {self.version(compiler)}"')
        jobs = [(path, flags + defines) for folder in BASELINE for path in sources(folder)]
        jobs.append(("csrc/dispatch.c", flags + defines))
        jobs += [(path, flags + ISA_FLAGS[isa]) for isa in isa_built for path in isa_sources(isa)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile(compiler, include, *job), jobs))
        print(f"quantlab: built scalar {' '.join(isa_built)}; cuda: no kernels yet")
        output = self.get_ext_fullpath(extension.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", "-fopenmp", *sanitize * (os.environ.get("QL_SANITIZE") == "1")]
        subprocess.run([*link, *objects, "-lm", "-lpthread", "-o", output], check=True)

    def compile(self, compiler, include, source, flags):
        target = Path(self.build_temp) / (source.replace("/", "_") + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *flags, *include, "-c", source, "-o", str(target)], check=True, cwd=ROOT)
        return str(target.resolve())

    @staticmethod
    def probe(compiler, isa):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.c"
            source.write_text(PROBES[isa])
            command = [compiler, *ISA_FLAGS[isa], "-c", str(source), "-o", str(source.with_suffix(".o"))]
            return subprocess.run(command, capture_output=True).returncode == 0

    @staticmethod
    def version(compiler):
        result = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True)
        return result.stdout.strip() or "unknown"


if sys.platform != "linux":
    sys.exit("quantlab: only Linux is supported for now")

setup(
    ext_modules=[Extension("quantlab._core", sources=[], include_dirs=[numpy.get_include()])],
    cmdclass={"build_ext": BuildCore},
)
