"""Every published figure of hotglm, measured against its peer in the same run (`make bench`)."""
