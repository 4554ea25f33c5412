"""How arrays are sharded over the mesh, and the mesh as code on one device sees it."""
