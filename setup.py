"""Builds the CPU kernels, a plain shared library without Python or torch headers, as an option:
where it cannot be built the package installs without it and runs on torch."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("torchweave_ray/kernels/cpu")
COMMON = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"]
# Two shapes of one kernel must round alike: multiply-adds are fused where written so only.
COMMON += ["-ffp-contract=off", "-fno-math-errno", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "-mavx512vnni"],
    "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


class BuildKernels(build_ext):
    """One compiler call a file, each with the flags of its instruction set."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # not a Python module: no PyInit function

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for source in ext.sources:
            flags = [*COMMON, *FLAGS.get(Path(source).stem, [])]
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[str(FOLDER)],
                extra_postargs=flags,
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, extra_postargs=["-pthread"], target_lang="c++"
        )


class AnyPythonWheel(bdist_wheel):
    """The library serves every Python 3 of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def kernels() -> list[Extension]:
    """None where there is no instruction set to compile for: a pure wheel is right there."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name != "posix":
        return []
    sources = sorted(str(path) for path in FOLDER.rglob("*.cpp"))
    headers = sorted(str(path) for path in FOLDER.rglob("*.h"))
    return [Extension("torchweave_ray.kernels._cpu", sources, depends=headers, optional=True)]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel})
