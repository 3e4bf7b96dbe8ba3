"""The command line of kfac_fx; installed as `kfac_fx_cli`."""
