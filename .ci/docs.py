"""Runs the commands of the docs: every ```bash block that is marked with a line `# runs in CI`, page by page."""

import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```bash\n(# runs in CI.*?)^```', re.MULTILINE | re.DOTALL)


def main() -> int:
    """Runs the blocks and returns how many failed; each page has an empty folder of its own as its output."""
    failures, count = 0, 0
    for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]:
        with tempfile.TemporaryDirectory() as out:  # stands for the out/ of the commands
            for block in BLOCK.findall(page.read_text()):
                start = time.monotonic()
                script = block.replace('out/', f'{out}/')
                path = f'{pathlib.Path(sys.executable).parent}:/usr/bin:/bin'
                done = subprocess.run(
                    ['bash', '-euo', 'pipefail', '-c', script],
                    cwd=ROOT,
                    env={'PATH': path, 'HOME': out, 'JAX_PLATFORMS': 'cpu'},
                    capture_output=True,
                    text=True,
                )
                count += 1
                print(f'{page.name}: {block.splitlines()[1][:90]}: {time.monotonic() - start:.0f} s')
                if done.returncode:
                    failures += 1
                    print(f'{script}\n{done.stdout}\n{done.stderr}\nexit status {done.returncode}')
    print(f'{count} blocks of commands, {failures} failed')
    return 1 if failures or not count else 0


if __name__ == '__main__':
    sys.exit(main())
