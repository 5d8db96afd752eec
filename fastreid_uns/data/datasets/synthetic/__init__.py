"""Generated pedestrians and vehicles: `generator` plans and writes a set, the other modules draw its images."""

from fastreid_uns.data.datasets.synthetic.generator import synthetic as synthetic
