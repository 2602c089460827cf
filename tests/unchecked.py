"Tractograms that the library refuses to write, as other programs leave them."
import nibabel as nib
import numpy as np


def save_unchecked(lines, grid, path, dps=None):
    "Write lines in RAS mm as a .trk file, whatever is in them."
    affine = np.asarray(grid.affine)
    header = {"dimensions": np.array(grid.dimensions, "<i2"), "voxel_sizes": nib.affines.voxel_sizes(affine).astype("<f4"), "voxel_to_rasmm": affine.astype("<f4"),
              "voxel_order": grid.voxel_order}
    data = nib.streamlines.Tractogram([np.asarray(line) for line in lines], data_per_streamline=dps or {}, affine_to_rasmm=np.eye(4))
    nib.streamlines.save(data, path, header=header)
