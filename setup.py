"""Builds the native CPU kernels: a plain shared library, loaded with ctypes, that knows neither Python nor torch.

Everything else about the distribution is in pyproject.toml. Without a compiler the installation still succeeds.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/mars_optim/native/csrc")
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]
# No contraction: all levels of the instruction set give the same bits.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fno-wrapv",  # which Python's own flags ask for: loops over an int would be slower
    "-fvisibility=hidden",
    "-g0",
]
LINK_FLAGS = {"win32": [], "linux": ["-pthread", "-ldl"]}.get(sys.platform, ["-pthread"])


class BuildLibrary(build_ext):
    """A shared library in place of an extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # not PyInit_<name>: the sources say what they export

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "msvc":
            self.extensions[0].extra_compile_args = MSVC_FLAGS
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # a missing compiler has many names
            print(f"mars-optim: no native CPU kernels, the optimizer falls back to torch's functions: {error}")


class BdistWheel(bdist_wheel):
    """One wheel a platform, for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "mars_optim.native._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=[*FLAGS, "-pthread"],
            extra_link_args=LINK_FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BdistWheel},
)
