"""Reading NRRD and MetaImage, whose headers are checked before ITK sees them."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from monai.data import MetaTensor

from bundle.errors import InputError

from .atlas import from_sitk
from .formats import BEST_COMPRESSION, MOST_VOXELS

# power of the number of dimensions that each field of a MetaImage has numbers; ITK crashes where it has others
_META_NUMBERS = {
    "NDims": 0,
    "DimSize": 1,
    "ElementSpacing": 1,
    "ElementSize": 1,
    "Offset": 1,
    "Position": 1,
    "Origin": 1,
}
_META_NUMBERS |= {"CenterOfRotation": 1, "TransformMatrix": 2, "Rotation": 2, "Orientation": 2}
_META_NUMBERS |= {"HeaderSize": 0, "CompressedDataSize": 0, "ElementNumberOfChannels": 0, "ID": 0, "ParentID": 0}
_LONGEST_HEADER = 1 << 16
# spaces of NRRD that tell left from right; the first is ITK's own
_ANATOMICAL = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las")


def read_itk(file: str) -> MetaTensor:
    """Read a NRRD or MetaImage file, with its voxels inside or beside it, as ``[1, X, Y, Z]`` with affine in RAS mm.

    Raises:
        InputError: not readable, not one grey-scale volume, voxels in several files or in another folder, no
            orientation.
    """
    fields = _header_fields(file)
    data = _data_file(file, fields)
    try:
        reader = sitk.ImageFileReader()
        reader.SetFileName(file)
        reader.ReadImageInformation()
        shape, kind = reader.GetSize(), sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    except Exception as error:  # ITK's own, or a name that it cannot take
        raise InputError(f"{file}: cannot be read as {_called(file)}; is the file complete?") from error
    voxels = int(np.prod(shape, dtype=object))
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise InputError(f"{file}: holds colours, vectors or complex numbers; a scan has one grey value per voxel")
    if len(shape) not in (3, 4):
        raise InputError(f"{file}: has {len(shape)} dimensions; a scan has three")
    if len(shape) == 4 and shape[3] != 1:
        raise InputError(f"{file}: holds {shape[3]} volumes; split it and give one")
    if voxels > sum(f.stat().st_size for f in {Path(file), data}) * BEST_COMPRESSION:
        raise InputError(f"{file}: its header tells of {'x'.join(map(str, shape))} voxels, which it cannot hold")
    if voxels > MOST_VOXELS:
        raise InputError(f"{file}: has {'x'.join(map(str, shape))} voxels; no scan of a head is that large")
    if _called(file) == "NRRD" and not reader.HasMetaDataKey("NRRD_space"):
        raise InputError(f"{file}: its header has no orientation (space); set one")
    if fields.get("CompressedData", "").lower() == "true" and not _inflates(data):
        raise InputError(f"{file}: cannot be read as it was written (its checksum does not fit); is the file complete?")
    try:
        image = reader.Execute()
        scan = from_sitk(image[..., 0] if len(shape) == 4 else image)
    except Exception as error:
        raise InputError(f"{file}: cannot be read as {_called(file)}; is the file complete?") from error
    scan.meta["filename_or_obj"] = file
    space = reader.GetMetaData("NRRD_space").lower() if reader.HasMetaDataKey("NRRD_space") else _ANATOMICAL[0]
    if space.removesuffix("-time") not in _ANATOMICAL:
        scan.meta["doubt"] = f"its space is '{space}', which knows no left and right; taken for left-posterior-superior"
    return scan


def _called(file: str) -> str:
    return "NRRD" if file.lower().endswith((".nrrd", ".nhdr")) else "MetaImage"


def _header_fields(file: str) -> dict[str, str]:
    """Fields of a header of text, as they stand in it; those of a MetaImage are numbers where they have to be."""
    problem = InputError(f"{file}: cannot be read as {_called(file)}; is the file complete?")
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(_LONGEST_HEADER).decode("latin-1")
    except OSError as error:
        raise problem from error
    if _called(file) == "NRRD":
        if not text.startswith("NRRD"):
            raise problem
        lines = re.split(r"\n\r?\n", text)[0].splitlines()
        return {k.strip().lower(): v.strip() for k, mark, v in (line.partition(":") for line in lines) if mark}
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        key, mark, value = (part.strip() for part in line.partition("="))
        if not mark or key in fields or not key.isascii() or len(line) > 1000:
            raise problem
        fields[key] = value
        if key == "ElementDataFile":
            break
    dimensions = fields.get("NDims", "")
    if dimensions not in ("2", "3", "4") or not {"DimSize", "ElementType", "ElementDataFile"} <= set(fields):
        raise problem
    for key, power in _META_NUMBERS.items():
        numbers = fields[key].split() if key in fields else None
        if numbers is not None and (len(numbers) != int(dimensions) ** power or not all(map(is_number, numbers))):
            raise problem
    return fields


def is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?\d{1,25}(\.\d{0,25})?([eE][-+]?\d{1,2})?|[-+]?\.\d{1,25}", text) is not None


def _data_file(file: str, fields: dict[str, str]) -> Path:
    """Where the voxels are; a header could name any file of this machine, or a stream without end."""
    named = fields.get("ElementDataFile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    if named.upper() == "LOCAL":
        return Path(file)
    data = Path(file).parent / named
    if Path(named).name != named or "%" in named or named.upper().split()[0] == "LIST":
        raise InputError(f"{file}: its voxels must lie in one file beside it, not in '{named[:80]}'; save it as one")
    if not data.is_file():
        raise InputError(f"{file}: its voxels are missing ({named[:80]}); put that file beside it")
    return data


def _inflates(data: Path) -> bool:
    """Whether the stream of zlib at the end of a MetaImage has the checksum that it ends with: ITK does not look."""
    content = data.read_bytes()
    header = re.search(rb"ElementDataFile[^\n]*\n", content[:_LONGEST_HEADER])
    piece, stream = content[header.end() if header else 0 :], zlib.decompressobj(wbits=47)
    try:
        while piece and not stream.eof:
            stream.decompress(piece, 1 << 24)
            piece = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof
