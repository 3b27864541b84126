/* A kernel that touches what is at 4 GiB, says what it found there twice, with a
 * write in between, and waits for its end. Entered by PVH, in 32-bit mode without paging. */
	.section .note.Xen, "a", @note
	.long 4, 8, 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad start

	.bss
	.balign 4096
pml4:	.skip 4096
pdpt:	.skip 4096
low:	.skip 4096
high:	.skip 4096
	.skip 4096
stack:

	.data
	.balign 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr:	.word . - gdt - 1
	.long gdt

	.text
	.code32
	.globl start
start:
	movl	$stack, %esp
	movl	$pdpt + 3, pml4
	movl	$low + 3, pdpt
	movl	$high + 3, pdpt + 4 * 8
	/* A gibibyte at 0, and one at 4 GiB, in pages of 2 MiB. */
	xorl	%ecx, %ecx
1:	movl	%ecx, %eax
	shll	$21, %eax
	orl	$0x83, %eax
	movl	%eax, low(, %ecx, 8)
	movl	%eax, high(, %ecx, 8)
	movl	$1, high + 4(, %ecx, 8)
	incl	%ecx
	cmpl	$512, %ecx
	jb	1b
	movl	%cr4, %eax
	orl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER */
	rdmsr
	orl	$0x100, %eax		/* LME */
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000000, %eax	/* PG */
	movl	%eax, %cr0
	lgdt	gdtr
	ljmp	$8, $long

	.code64
long:
	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movabsq	$0x100000000, %rbx
	movl	(%rbx), %eax
	call	say
	movl	$0x600dcafe, (%rbx)
	movl	(%rbx), %eax
	call	say
	cli
hang:	hlt
	jmp	hang

/* Prints %eax in hexadecimal, and a new line. */
say:
	movl	$8, %ecx
1:	roll	$4, %eax
	movl	%eax, %esi
	andl	$15, %esi
	movb	digits(%rsi), %dl
	pushq	%rax
	movb	%dl, %al
	movw	$0x3f8, %dx
	outb	%al, %dx
	popq	%rax
	decl	%ecx
	jnz	1b
	movb	$10, %al
	movw	$0x3f8, %dx
	outb	%al, %dx
	ret

	.data
digits:	.ascii "0123456789abcdef"

	.section .note.GNU-stack, "", @progbits
