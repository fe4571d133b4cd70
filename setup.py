"""Build configuration: metadata from settings.ini, the version from the package itself."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

LICENSES = {'apache2': 'Apache-2.0'}
STATUSES = {
    1: '1 - Planning',
    2: '2 - Pre-Alpha',
    3: '3 - Alpha',
    4: '4 - Beta',
    5: '5 - Production/Stable',
}


def read_settings():
    """Return the [DEFAULT] section of settings.ini."""
    parser = ConfigParser(interpolation=None)
    with open(ROOT / 'settings.ini', encoding='utf-8') as f:
        parser.read_file(f)
    return parser['DEFAULT']


def read_version(package):
    """Return `__version__` of `package` without importing it."""
    text = (ROOT / package / '__init__.py').read_text(encoding='utf-8')
    found = re.search(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f'no __version__ in {package}/__init__.py')
    return found.group(1)


cfg = read_settings()
name = cfg['lib_name']

setup(
    name=name,
    version=read_version(name),
    description=cfg['description'],
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    license_expression=LICENSES[cfg['license']],
    license_files=['LICENSE'],
    classifiers=[
        f"Development Status :: {STATUSES[cfg.getint('status')]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[name, name + '.*']),
    install_requires=cfg['requirements'].split(),
    package_data={name: ['published.csv', 'measured.csv']},
    extras_require={'dev': cfg['dev_requirements'].split(), 'ray': cfg['ray_requirements'].split(),
                    'text': cfg['text_requirements'].split(),
                    'dense': cfg['dense_requirements'].split(),
                    'distributed': cfg['distributed_requirements'].split()},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{name}={name}._modidx:d'],
    },
    zip_safe=False,
)
