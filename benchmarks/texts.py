"""Write an evaluation text: the Debian Administrator's Handbook, from the Debian package debian-handbook.

python benchmarks/texts.py OUT.txt                      # apt-get download: needs Debian or Ubuntu
python benchmarks/texts.py OUT.txt --deb FILE.deb       # a package already here

The pages come in alphabetical order. Tags become spaces, lines are stripped, empty ones dropped. The figures in the
documentation are from version 11.20220922 (Debian 12), English, of which perplexity.py reads the first tokens.
"""

import argparse
import re
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

PACKAGE = "debian-handbook"
PAGES = "usr/share/doc/debian-handbook/html"
UNSEEN = ("script", "style")


class VisibleText(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        """Start with no text."""
        super().__init__()
        self.parts: list[str] = []
        self.unseen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Separate words, and hide what follows in scripts and styles."""
        self.parts.append(" ")
        self.unseen += tag in UNSEEN

    def handle_endtag(self, tag: str) -> None:
        """Separate words, and show again what follows."""
        self.parts.append(" ")
        self.unseen -= tag in UNSEEN

    def handle_data(self, data: str) -> None:
        """Keep what a reader sees."""
        if not self.unseen:
            self.parts.append(data)


def page_text(html: str) -> str:
    """Return the text of one page, one line per line of text."""
    parser = VisibleText()
    parser.feed(html)
    parser.close()
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", "".join(parser.parts))).strip()


def download(folder: Path) -> Path:
    """Fetch the package with apt into a folder."""
    subprocess.run(["apt-get", "download", "--quiet=2", PACKAGE], cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def handbook(deb: Path | None, language: str) -> str:
    """Return the text of all pages in one language."""
    with tempfile.TemporaryDirectory() as work:
        # apt fetches as its own user where it may write
        Path(work).chmod(0o777)
        subprocess.run(["dpkg", "-x", str(deb or download(Path(work))), f"{work}/unpacked"], check=True)
        pages = sorted(Path(work, "unpacked", PAGES, language).glob("*.html"))
        if not pages:
            raise SystemExit(f"{PACKAGE} has no pages in {language}")
        return "\n\n".join(page_text(page.read_text(encoding="utf-8")) for page in pages)


def main() -> None:
    """Read the command line, write the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--deb", type=Path, help="package file, instead of downloading it")
    parser.add_argument("--language", default="en-US", help="as the package names its folders: zh-CN, fr-FR …")
    args = parser.parse_args()
    args.out.write_text(handbook(args.deb, args.language), encoding="utf-8")


if __name__ == "__main__":
    main()
