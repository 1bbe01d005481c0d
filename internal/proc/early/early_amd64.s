#include "textflag.h"

// func raw(trap, a1, a2, a3, a4 uintptr) uintptr
TEXT ·raw(SB),NOSPLIT,$0-48
	MOVQ	trap+0(FP), AX
	MOVQ	a1+8(FP), DI
	MOVQ	a2+16(FP), SI
	MOVQ	a3+24(FP), DX
	MOVQ	a4+32(FP), R10
	SYSCALL
	MOVQ	AX, ret+40(FP)
	RET
