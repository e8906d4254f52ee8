"""The quality studies' parts: what is trained (tasks), by what (methods), one training (training), the page."""
