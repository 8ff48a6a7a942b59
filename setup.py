"""Builds quantlab._core: a table of source groups, each with its own compiler flags and a probe; prints what was found.

Environment: CC chooses the compiler; QL_CUDA=0 leaves CUDA out; QL_CUDA_ARCHS=90a (80,90a,90+PTX: a list of numbers)
narrows its architectures; QL_WERROR=1 makes warnings errors; QL_SANITIZE=1 builds with AddressSanitizer and UBSan.
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
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AVX512_BF16 = [*AVX512_VNNI, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
BASELINE = ["csrc/*.c", "csrc/core/*.c", "csrc/ops/*.c", "csrc/quant/*.c", "csrc/model/*.c", "csrc/python/*.c"]
BASELINE_PROBE = "#include <Python.h>\n#include <pthread.h>\nint f(void) { return (int)pthread_self(); }\n"
INTRINSICS = "#include <immintrin.h>\n"
GROUPS = {
    "baseline": (BASELINE, [], BASELINE_PROBE),
    "avx2": (["csrc/x86/*_avx2.c"], AVX2, INTRINSICS + "__m256 f(__m256 a) { return _mm256_fmadd_ps(a, a, a); }\n"),
    "avx512": (["csrc/x86/*_avx512.c"], AVX512, INTRINSICS + "__m512 f(__m512 a) { return _mm512_add_ps(a, a); }\n"),
    "avx512_vnni": (
        ["csrc/x86/*_avx512_vnni.c"],
        AVX512_VNNI,
        INTRINSICS + "__m512i f(__m512i a) { return _mm512_dpbusd_epi32(a, a, a); }\n",
    ),
    "avx512_bf16": (
        ["csrc/x86/*_avx512_bf16.c"],
        AVX512_BF16,
        INTRINSICS + "__m512i f(__m512 a) { return (__m512i)_mm512_cvtne2ps_pbh(a, a); }\n",
    ),
    "amx": (["csrc/x86/*_amx.c"], AMX, INTRINSICS + "void f(void) { _tile_dpbf16ps(0, 1, 2); _tile_dpbssd(3, 4, 5); }"),
}

# -ffp-contract=off: a fused multiply-add appears only where a kernel asks for it, so results do not depend on flags.
# -fstack-clash-protection: a task keeps up to some 140 KiB on the stack; in a thread with less it must not step over
# the guard page.
COMMON = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
          "-fstack-clash-protection", "-Wall", "-Wextra", "-Wpedantic"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


def env_set(name):
    return os.environ.get(name) == "1"


def sources(patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def largest_first(paths):
    return sorted(paths, key=lambda path: -(ROOT / path).stat().st_size)


def stop(message):
    sys.exit(f"quantlab: {message}")


def find_nvcc():
    """nvcc of CUDA_HOME, of PATH, or of the pip packages; None where there is none."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if "CUDA_HOME" in os.environ else []
    places += [Path(found) for found in [shutil.which("nvcc")] if found]
    places += [Path(folder) / "nvidia" / "cuda_nvcc" / "bin" / "nvcc" for folder in sys.path]
    return next((str(place) for place in places if place.is_file()), None)


# Device code for Ampere and Hopper, and PTX that later drivers compile for what comes after them.
CUDA_ARCHS = "80,90a,90+PTX"
# The host's part of a .cu file needs nothing of the C++ library: the extension is linked as C.
CUDA_HOST = ["-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-Wall",
             "-Wextra"]  # fmt: skip
CUDA_FLAGS = ["-std=c++17", "-O3", "-compress-mode=size", "-diag-suppress=177"]  # 177: a static helper not used here


def cuda_architectures():
    """nvcc's -gencode flags of QL_CUDA_ARCHS."""
    flags = []
    for word in os.environ.get("QL_CUDA_ARCHS", CUDA_ARCHS).split(","):
        number, _, ptx = word.strip().partition("+")
        code = f"compute_{number}" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


class Nvcc:
    """nvcc, where it is found and compiles; `why_not` says why it is left out."""

    def __init__(self):
        self.path = None if os.environ.get("QL_CUDA") == "0" else find_nvcc()
        self.version, self.library, self.why_not = "", None, ""
        if os.environ.get("QL_CUDA") == "0":
            self.why_not = "left out (QL_CUDA=0)"
        elif env_set("QL_SANITIZE"):
            self.why_not = "left out (QL_SANITIZE=1)"
        elif self.path is None:
            self.why_not = "left out, no nvcc in CUDA_HOME, PATH or the pip packages"
        else:
            self.why_not = self.look()
        folders = ("csrc", "csrc/core", "csrc/formats", "csrc/quant", "cuda")  # of what .cu files include
        seen = [f"{folder}/*.h" for folder in folders] + ["cuda/*.cuh"]
        headers = b"".join((ROOT / path).read_bytes() for path in sources(seen))
        self.headers = hashlib.sha256(headers).hexdigest()

    def look(self):
        """Why nvcc cannot be used, "" where it can; finds its version and the static runtime."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cu"
            probe.write_text("#include <cuda_runtime.h>\n__global__ void f(float *x) { *x = 1.0f; }\n")
            command = [self.path, *CUDA_FLAGS, *cuda_architectures(), "-c", probe, "-o", probe.with_suffix(".o")]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                return f"left out, {self.path} cannot compile: {(result.stderr or result.stdout).strip()}"
        says = subprocess.run([self.path, "--version"], capture_output=True, text=True).stdout
        self.version = next((word.strip(",V") for word in says.split() if word.startswith("V")), "unknown")
        root = self.root()
        places = [root / "lib64", root / "lib", root.parent / "cuda_runtime" / "lib", root / "targets/x86_64-linux/lib"]
        found = [place / "libcudart_static.a" for place in places if (place / "libcudart_static.a").is_file()]
        if not found:
            return f"left out, no libcudart_static.a beside {self.path}"
        self.library = str(found[0])
        return ""

    def root(self):
        """The toolkit's folder: nvcc itself may be a script on PATH that calls another."""
        said = subprocess.run([self.path, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        tops = [line.partition("TOP=")[2] for line in (said.stderr + said.stdout).splitlines() if "TOP=" in line]
        return Path(tops[0].strip() if tops else Path(self.path).parent.parent).resolve()

    def flags(self):
        host = [*CUDA_HOST, *["-Werror"] * env_set("QL_WERROR")]
        warnings = ["-Werror=all-warnings"] * env_set("QL_WERROR")
        return [*CUDA_FLAGS, *cuda_architectures(), *warnings, "-Xcompiler", ",".join(host)]

    def compile(self, source, folder):
        """The object of `source`, kept under a name that holds a hash of command, source and all headers."""
        command = [self.path, *self.flags(), "-c", source]
        key = [*command, self.version, self.headers]
        digest = hashlib.sha256("\0".join(key).encode() + (ROOT / source).read_bytes()).hexdigest()
        target = folder / f"{source.replace('/', '_')}.{digest[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            if subprocess.run([*command, "-o", str(partial)], cwd=ROOT).returncode != 0:
                stop(f"{source} did not compile; nvcc's message is above. QL_CUDA=0 builds without CUDA.")
            partial.rename(target)
        return str(target)


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
            command = [*self.command, *flags, *self.include, "-c", source, "-o", source.with_suffix(".o")]
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
        nvcc = Nvcc()
        cuda_sources = [] if nvcc.why_not else sources(["cuda/*.cu"])
        defines += ["-DQL_BUILT_CUDA"] * bool(cuda_sources)
        report.append(f"cuda: {nvcc.why_not or f'built, {len(cuda_sources)} files, nvcc {nvcc.version}'}")
        sys.path.insert(0, str(ROOT))
        from quantlab.sources import fingerprint  # which the Python layer compares with

        module_flags = [f'-DQL_SOURCES="{fingerprint(ROOT)}"']  # of one file, so that not all are compiled again
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [lambda source=source: nvcc.compile(source, folder) for source in largest_first(cuda_sources)]
        for group in built:
            patterns, group_flags, _ = GROUPS[group]
            group_flags = [*flags, *defines, *group_flags]
            for source in sources(patterns):
                own = [*group_flags, *module_flags] if source == "csrc/python/module.c" else group_flags
                jobs.append(lambda source=source, flags=own: compiler.compile(source, flags, folder))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda job: job(), jobs))
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [*compiler.command, "-shared", *SANITIZE * env_set("QL_SANITIZE"), *objects]
        libraries = [nvcc.library, "-ldl", "-lrt"] if cuda_sources else []
        subprocess.run([*link, *libraries, "-lm", "-lpthread", "-o", str(output)], check=True)
        print(f"quantlab: compiler {version}\n" + "\n".join(f"quantlab: {line}" for line in report))

    @staticmethod
    def choose_groups(compiler):
        """The groups to build, and a line for each group that says why or why not."""
        trouble = compiler.probe([], BASELINE_PROBE)
        if trouble is not None:
            stop(f"a first C file did not compile. Are Python's headers (python3-dev) there?\n{trouble}")
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
        return built, report


if sys.platform != "linux":
    stop("only Linux is supported for now")

setup(
    ext_modules=[Extension("quantlab._core", sources=[], include_dirs=[numpy.get_include()])],
    cmdclass={"build_ext": BuildCore},
)
