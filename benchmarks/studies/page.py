"""The page of the quality studies."""


def write_page(folder, scores): ...
