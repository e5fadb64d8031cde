"""Everything comes from settings.ini. (nbdev's own template needs pkg_resources, which setuptools 82 dropped.)"""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


class build_py_with_notebooks(build_py):
    """The runner executes notebooks, so the wheel carries them, and the data files that code reads. An editable install finds them in the checkout."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for src in [*Path("nbs").glob("*.ipynb"), *Path("nbs/params").glob("*.yaml"), *Path("nbs/data").glob("*.json")]:
            dst = Path(self.build_lib, cfg["lib_path"], src)
            self.mkpath(str(dst.parent))
            self.copy_file(str(src), str(dst))


readme = Path("README.md")
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],  # links from other nbdev sites to our docs
    },
    cmdclass={"build_py": build_py_with_notebooks},
    zip_safe=False,  # notebooks are opened by path
)
