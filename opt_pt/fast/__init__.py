"""Faster routes to what the modules compute: engines and kernels. They import no model; each is given one, and asks
`plain` whether running its modules one by one would compute the same."""
