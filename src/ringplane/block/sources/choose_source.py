"""The choice of a disk's source: the one that was requested by the name of its engine, or what suits the image."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Iterable

from ringplane.block import mapped_image
from ringplane.block.image import Image, ImageError
from ringplane.block.sources.file import FileSource
from ringplane.block.sources.memory import MemorySource
from ringplane.block.sources.null import NullSource
from ringplane.options.engine_names import AUTO, MEMORY, NULL, THREAD_ENGINES
from ringplane.system import huge_pages

log = logging.getLogger(__name__)

Source = FileSource | MemorySource | NullSource


def kind_of_source(image: Image, engine: str) -> type[Source]:
    """Raises ImageError if this engine cannot serve the image."""
    if engine == NULL:
        return NullSource
    if engine in THREAD_ENGINES and engine != AUTO:
        return FileSource
    if mapped_image.is_memory(image.fd):
        return MemorySource
    if engine == MEMORY:
        raise ImageError(
            f"{image.path}: engine memory serves only images on tmpfs and hugetlbfs; use --engine auto for this image"
        )
    return FileSource


def check_engines(image: Image, kind: type[Source], reasons: Iterable[str]) -> None:
    """Raises ImageError if the source needs an engine; the reasons say why I/O threads have none (empty: they have)."""
    for without_io in reasons:
        if kind is FileSource and without_io:
            raise ImageError(
                f"{image.path}: no engine for files and devices here, only for images on tmpfs: {without_io}"
            )


def open_source(image: Image, engine: str, reasons: Collection[str]) -> Source:
    """For `reasons` see `check_engines`. Raises ImageError if the image cannot be served this way."""
    kind = kind_of_source(image, engine)
    check_engines(image, kind, reasons)
    try:
        return kind(image)
    except OSError as error:
        if kind is not MemorySource:
            raise
        _check_unmapped(image, engine, error)
    check_engines(image, FileSource, reasons)
    return FileSource(image)


def check_huge_pages(image: Image) -> None:
    """Raises ImageError if there are fewer huge pages than an image on hugetlbfs needs; nothing is reserved.

    Those that are reserved for other files are not noticed: the kernel does not show which ones they are.
    """
    if not mapped_image.has_huge_pages(image.fd):
        return
    status = os.fstat(image.fd)
    page = status.st_blksize
    missing = -(-image.size // page) - status.st_blocks * 512 // page
    most = huge_pages.most(page)
    if most is not None and missing > most:
        raise _no_huge_pages(image, os.strerror(errno.ENOMEM))


def _no_huge_pages(image: Image, why: str) -> ImageError:
    return ImageError(
        f"{image.path}: cannot be mapped: {why}; huge pages are reserved for all of it: raise sysctl vm.nr_hugepages"
    )


def _check_unmapped(image: Image, engine: str, error: OSError) -> None:
    """Raise ImageError unless system calls may serve an image in memory that cannot be mapped."""
    if mapped_image.has_huge_pages(image.fd):
        raise _no_huge_pages(image, error.strerror or str(error))
    why = f"{image.path}: cannot be mapped: {error.strerror}"
    if engine != AUTO:
        raise ImageError(f"{why}; --engine auto serves it by system calls")
    log.warning("%s; it is served by system calls, which take more CPU per I/O", why)
